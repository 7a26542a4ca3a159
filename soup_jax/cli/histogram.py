"""`soup-jax histogram`: which domains documents are made of.

    soup-jax histogram --documents=mine.jsonl --corpus=corpus

A line for each domain that has weight, the heaviest first: its weight h, the range in which h of
other documents of the kind would lie nine times in ten, by how much these differ among themselves,
and its share of the corpus. No model is needed.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from soup_jax.cli import domains
from soup_jax.errors import UserError
from soup_jax.storage import check_file_target, refuse_address, write_json

POSITIONAL = "documents"


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    domains.define_map(values)
    string, multi = flags.DEFINE_string, flags.DEFINE_multi_string
    multi("documents", [], "file, folder or glob; may be repeated", flag_values=values)
    string("text_field", "text", "of a JSON line or Parquet row", flag_values=values)
    string(
        "json",
        "",
        "a file that gets the K weights; domain_weights.path takes it",
        flag_values=values,
    )
    flags.DEFINE_integer("most", 20, "lines; 0: all", lower_bound=0, flag_values=values)


def run(values: flags.FlagValues) -> int:
    """Print the table; returns the exit status."""
    if not values.documents:
        raise UserError("--documents is required")
    domains.check(values)
    for source in values.documents:
        refuse_address(source, "--documents", objects=True)
    if values.json:
        check_file_target(values.json, "--json")
    from soup_jax.data import domain_histogram, domain_report
    from soup_jax.evaluation.sample import read_sample
    from soup_jax.specialists.open import map_of

    sample = read_sample(values.documents, text_field=values.text_field)
    for line in [*sample.summary(), *sample.damage, *sample.warnings()]:
        print(line)
    domain_map = map_of(run=values.run, corpus_dir=values.corpus, num_domains=values.num_domains)
    texts = [document.text for document in sample.documents]
    found = domain_histogram.document_histogram(domain_map, texts, resamples=1000)
    print(domain_histogram.table(found, domain_map, most=values.most))
    for warning in found.warnings():
        print(f"warning: {warning}")
    if values.json:
        write_json(values.json, [float(weight) for weight in found.h_K])
        print(f"weights: {values.json}")
    if values.picture:
        out = pathlib.Path(values.picture)
        print(f"picture: {domain_report.draw(domain_map, out, weights_K=found.h_K)}")
    return 0
