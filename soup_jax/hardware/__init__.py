"""Devices: the mesh, chips by data sheet, compiled code on disk, host memory."""
