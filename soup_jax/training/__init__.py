"""The training loop: set-up, state, step, checkpoints, metrics."""
