"""Configs of the methods that docs/results.md compares."""
