"""Base networks: what is asked of one, and the shipped decoder."""
