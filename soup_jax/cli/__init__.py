"""The console command `soup-jax`."""
