"""`soup-jax pack`: the soup of a run as a folder that can be copied anywhere.

    soup-jax pack --run=runs/quickstart/soup --out=soup [--dtype=bfloat16]

`soup-jax instantiate --run=soup` then needs neither the run nor its corpus.
"""

from collections.abc import Sequence

from absl import flags

from soup_jax.errors import UserError


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    flags.DEFINE_string("run", "", "the run whose soup is packed", flag_values=values)
    flags.DEFINE_string("out", "", "the new folder", flag_values=values)
    flags.DEFINE_string("corpus", "", "the prepared corpus, if it was moved", flag_values=values)
    flags.DEFINE_integer(
        "average", 1, "the mean of so many checkpoints", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer("step", None, "checkpoint; default the newest", flag_values=values)
    flags.DEFINE_enum(
        "dtype",
        "",
        ["", "float32", "bfloat16"],
        "of the bank; default: as the run stores it",
        flag_values=values,
    )


def run(values: flags.FlagValues) -> int:
    """Write the folder; returns the exit status."""
    for name in ("run", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is required")
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    from soup_jax.specialists.pack import pack

    soup = pack(
        values.run,
        values.out,
        step=values.step,
        average=values.average,
        dtype=values.dtype,
        corpus_dir=values.corpus,
    )
    print(
        f"soup folder: {values.out} (step {soup.step}, {soup.num_experts} experts, "
        f"{soup.num_domains} domains)"
    )
    return 0
