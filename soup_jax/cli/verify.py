"""`soup-jax verify`: is a corpus, a run or a specialist what was written?

    soup-jax verify runs/quickstart/soup

Reads all of it and compares checksums. The exit status is 2 if something is damaged.
"""

from collections.abc import Sequence

from absl import flags

from soup_jax.errors import UserError

POSITIONAL = "path"


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    flags.DEFINE_string("path", "", "folder of a corpus, run or specialist", flag_values=values)


def run(values: flags.FlagValues) -> int:
    """Print what is sound; returns the exit status."""
    if not values.path:
        raise UserError("name a folder: soup-jax verify PATH")
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    from soup_jax.specialists.verify import verify

    print("\n".join(verify(values.path)))
    return 0
