"""`soup-jax instantiate`: a handful of documents -> one small model.

    soup-jax instantiate --run=runs/quickstart/soup --documents=mine.jsonl --out=specialist

Documents are files, folders or globs, and --documents may be repeated: all of them are the sample
of one specialist. The folder holds a plain small model, its tokenizer and the recipe it was made
by.
"""

from collections.abc import Sequence

from absl import flags

from soup_jax.errors import UserError


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    string, multi = flags.DEFINE_string, flags.DEFINE_multi_string
    string("run", "", "the run, or the soup folder, whose soup is used", flag_values=values)
    multi(
        "documents",
        [],
        "file, folder or glob of sample documents; may be repeated: all files together are the "
        "sample of one specialist",
        flag_values=values,
    )
    string("out", "", "folder the specialist is written to", flag_values=values)
    string("corpus", "", "the prepared corpus, if it was moved", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint; default the newest", flag_values=values)


def run(values: flags.FlagValues) -> int:
    """Write the specialist and say what its documents are like; returns the exit status."""
    for name in ("run", "documents", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is required")
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    from soup_jax.specialists.instantiate import instantiate_to

    made, nearest = instantiate_to(
        values.run,
        values.documents,
        values.out,
        step=values.step,
        corpus_dir=values.corpus,
        say=print,
    )
    histogram = made.histogram
    assert histogram is not None  # documents gave h
    print(f"{histogram.num_documents} documents, most like these domains of the corpus:")
    for label, weight in nearest:
        print(f"  {weight:6.1%}  {label}")
    for warning in histogram.warnings():
        print(f"warning: {warning}")
    print(f"specialist: {values.out}")
    return 0
