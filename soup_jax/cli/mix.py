"""`soup-jax mix`: which mixture of domains to train on, for some target documents.

    soup-jax mix --run=runs/quickstart/soup --target=mine.jsonl --out=h.json --generic_within=0.01

The soup is the oracle: the domain weights h at which its merged model predicts the target best. One
of five documents is held back, and the losses are of these. With --generic_within, h lies between
the natural frequencies and the h that was found, as far from the first as the soup's loss on the
corpus's own validation windows stays within that share of what it is there.
"""

import math
import shlex
from collections.abc import Sequence

from absl import flags

from soup_jax.errors import UserError
from soup_jax.storage import check_file_target, refuse_address, write_json


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    string = flags.DEFINE_string
    string("run", "", "the run, or the soup folder, whose soup is asked", flag_values=values)
    flags.DEFINE_multi_string(
        "target",
        [],
        "file, folder or glob of target documents; may be repeated: all files are one pool",
        flag_values=values,
    )
    string(
        "out",
        "",
        "a file that gets the K weights; domain_weights.path takes it",
        flag_values=values,
    )
    flags.DEFINE_float(
        "generic_within",
        None,
        "by what share the loss on the corpus's validation windows may be above that at the "
        "natural frequencies, such as 0.01; default: any",
        flag_values=values,
    )
    string("corpus", "", "the prepared corpus, if it was moved", flag_values=values)
    flags.DEFINE_integer("most", 20, "lines; 0: all", lower_bound=0, flag_values=values)


def run(values: flags.FlagValues) -> int:
    """Write the weights and say what they are; returns the exit status."""
    for name in ("run", "target", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is required")
    for source in values.target:
        refuse_address(source, "--target", objects=True)
    check_file_target(values.out, "--out")
    within = values.generic_within
    if within is not None and not 0 <= within < math.inf:
        raise UserError(f"--generic_within={within} must be a number of at least 0")
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    from soup_jax.specialists import mixture
    from soup_jax.specialists.instantiate import read_texts
    from soup_jax.specialists.open import load

    soup = load(values.run, corpus_dir=values.corpus)
    texts = read_texts(soup, values.target, method="search_h", say=print)
    found = mixture.find_mixture(soup, texts, generic_within=within)
    print(mixture.table(soup, found, most=values.most))
    print(mixture.losses_table(found))
    repeats = mixture.repetition_warning(soup, found.h_K)
    for warning in [*found.histogram.warnings(), *([repeats] if repeats else [])]:
        print(f"warning: {warning}")
    write_json(values.out, [float(weight) for weight in found.h_K])
    print(f"weights: {values.out}")
    path = shlex.quote(values.out)
    print(
        "train on them: soup-jax train --config=C:generic --config.domain_weights.generic=0 "
        f"--config.domain_weights.file=1 --config.domain_weights.path={path} --workdir=RUN"
    )
    return 0
