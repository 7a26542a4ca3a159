"""Losses of specialists and baselines on held-out text."""
