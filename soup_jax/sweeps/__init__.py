"""Sweeps: many runs that differ in some fields, their pool of processes, and their table."""
