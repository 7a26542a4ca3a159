"""`soup-jax prepare`: raw text -> prepared corpus.

    soup-jax prepare --config=experiments/quickstart.py

The same command continues a preparation that stopped. Many machines that share a disk take a shard
of the work each, in rounds:

    soup-jax prepare --config=C --shard=3/64     as many as that, at the same time; then
    soup-jax prepare --config=C --merge          one; and so on, until --merge has made the corpus,
                                                 until when its exit status is 75

or leave the work to Apache Beam, `--beam="--runner=..."`. With --self_test the command writes
nothing: it plants near duplicates and contaminated documents among some of the sources, and tells
how many it finds.
"""

import re
from collections.abc import Sequence

from absl import flags

from soup_jax import remote
from soup_jax.cli import config_flag
from soup_jax.errors import UserError

WAITING = 75  # EX_TEMPFAIL of sysexits.h


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    config_flag.define(values, argv)
    string = flags.DEFINE_string
    string("shard", "", "i/n: the i-th of n shares of what can be done now", flag_values=values)
    flags.DEFINE_bool(
        "merge",
        False,
        "do what one process must do alone, if all shards are done",
        flag_values=values,
    )
    string("beam", "", "run the jobs with Apache Beam, with these options", flag_values=values)
    flags.DEFINE_bool(
        "self_test",
        False,
        "plant near duplicates and contamination, tell which are found, write nothing",
        flag_values=values,
    )


def run(values: flags.FlagValues) -> int:
    """Prepare the config's corpus; returns the exit status."""
    ways = ("shard", "merge", "beam", "self_test")
    if len(given := [f"--{name}" for name in ways if values[name].value]) > 1:
        raise UserError(f"{given[0]} and {given[1]} do not go together")
    part = shard(values.shard)
    cfg = config_flag.checked(values)
    if values.self_test:
        from soup_jax.data.prepare.self_test import self_test

        lines, good = self_test(cfg)
        print("\n".join(lines))
        return 0 if good else 1
    from soup_jax.data.prepare import stages
    from soup_jax.data.prepare.work import Part

    if values.beam:
        if remote.is_object(cfg.corpus.dir):
            raise UserError(
                f"--config.corpus.dir={cfg.corpus.dir} is an address: the workers of --beam need a "
                "disk that they share. Copy the finished corpus there"
            )
        from soup_jax.data.prepare.beam import beam_map

        stages.prepare(cfg, map=beam_map(values.beam))
    elif values.merge:
        return 0 if stages.prepare_part(cfg, Part(number=0)) else WAITING
    elif part:
        stages.prepare_part(cfg, Part(*part, merges=False))
    else:
        stages.prepare(cfg)
    return 0


def shard(text: str) -> tuple[int, int] | None:
    """(i, n) of the flag --shard=i/n, None without it.

    Raises:
      UserError: it is something else.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--shard={text} must be i/n, i from 0 to n - 1, such as 3/64")
    return int(match[1]), int(match[2])
