"""`soup-jax domains`: what a corpus is made of.

    soup-jax domains --corpus=corpus --picture=domains.png

A line for each domain, the largest first: share of the training text, documents, windows, words
that tell it from the others. --run takes a run or a soup folder instead, which need no corpus.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from soup_jax.errors import UserError
from soup_jax.storage import check_file_target, write_json

POSITIONAL = "corpus"
PICTURES = (".png", ".svg", ".pdf")


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    define_map(values)
    flags.DEFINE_integer(
        "most", 0, "lines; 0: one for each domain", lower_bound=0, flag_values=values
    )
    flags.DEFINE_string("json", "", "a file that gets all of it", flag_values=values)


def define_map(values: flags.FlagValues) -> None:
    """The flags that say which domains."""
    string = flags.DEFINE_string
    string("corpus", "", "a prepared corpus", flag_values=values)
    string("run", "", "or a run, or a soup folder", flag_values=values)
    flags.DEFINE_integer(
        "num_domains", 0, "of a coarser level of the corpus", lower_bound=0, flag_values=values
    )
    string("picture", "", f"a file that gets a picture, {', '.join(PICTURES)}", flag_values=values)


def check(values: flags.FlagValues) -> None:
    """Refuse flags that cannot be, before anything is read."""
    if bool(values.corpus) == bool(values.run):
        raise UserError("give the domains: --corpus=DIR of a prepared corpus, or --run=RUN")
    if values.num_domains and values.run:
        raise UserError("--num_domains is a level of a --corpus; a run has its own")
    if values.picture:
        if pathlib.Path(values.picture).suffix not in PICTURES:
            raise UserError(f"--picture={values.picture} must end in {', '.join(PICTURES)}")
        check_file_target(values.picture, "--picture")


def run(values: flags.FlagValues) -> int:
    """Print the table; returns the exit status."""
    check(values)
    if values.json:
        check_file_target(values.json, "--json")
    from soup_jax.data import domain_report
    from soup_jax.specialists.open import map_of

    domain_map = map_of(run=values.run, corpus_dir=values.corpus, num_domains=values.num_domains)
    print(domain_report.table(domain_map, most=values.most))
    if values.json:
        found = domain_report.rows(domain_map)
        write_json(values.json, {"corpus": domain_map.fingerprint, "domains": found})
        print(f"numbers: {values.json}")
    if values.picture:
        print(f"picture: {domain_report.draw(domain_map, pathlib.Path(values.picture))}")
    return 0
