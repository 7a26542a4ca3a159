"""`soup-jax prepare`: raw text -> prepared corpus.

    soup-jax prepare --config=experiments/quickstart.py

The same command continues a preparation that stopped. With --self_test it writes nothing: it plants
near duplicates and contaminated documents among some of the sources, and tells how many it finds.
"""

from collections.abc import Sequence

from absl import flags

from soup_jax.cli import config_flag


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    config_flag.define(values, argv)
    flags.DEFINE_bool(
        "self_test",
        False,
        "plant near duplicates and contamination, tell which are found, write nothing",
        flag_values=values,
    )


def run(values: flags.FlagValues) -> int:
    """Prepare the config's corpus; returns the exit status."""
    from soup_jax.data.prepare import stages

    cfg = config_flag.checked(values)
    if values.self_test:
        from soup_jax.data.prepare.self_test import self_test

        lines, good = self_test(cfg)
        print("\n".join(lines))
        return 0 if good else 1
    stages.prepare(cfg)
    return 0
