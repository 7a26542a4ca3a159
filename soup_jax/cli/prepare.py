"""`soup-jax prepare`: raw text -> prepared corpus.

    soup-jax prepare --config=experiments/quickstart.py

The same command continues a preparation that stopped.
"""

from collections.abc import Sequence

from absl import flags

from soup_jax.cli import config_flag


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    config_flag.define(values, argv)


def run(values: flags.FlagValues) -> int:
    """Prepare the config's corpus; returns the exit status."""
    from soup_jax.data.prepare import stages

    stages.prepare(config_flag.checked(values))
    return 0
