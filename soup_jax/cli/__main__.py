"""`python -m soup_jax.cli SUBCOMMAND ...`: the console command."""

from soup_jax.cli.main import main

main()
