"""Run configurations; installed as `soup_jax.experiments`."""
