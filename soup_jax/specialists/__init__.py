"""From a trained soup to specialists: instantiate, generate, compare."""
