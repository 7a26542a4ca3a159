"""`soup-jax instantiate`: a handful of documents -> one small model.

    soup-jax instantiate --run=runs/quickstart/soup --documents=mine.jsonl --out=specialist

Documents are files, folders or globs, and --documents may be repeated: all of them are the sample
of one specialist. The folder holds a plain small model, its tokenizer and the recipe it was made
by. Its coefficients are searched for, from those of the router on: a quarter of a minute for a
small network. `--method=histogram` takes the router's.

    soup-jax instantiate --run=runs/quickstart/soup --recipe=many.yaml --out=specialists

makes one for each entry of a YAML file (`soup_jax/specialists/many.py` shows one), in folders of
their names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

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
    string("recipe", "", "instead: a YAML file that describes many", flag_values=values)
    string(
        "out",
        "",
        "folder the specialist is written to; with --recipe, a folder of their folders",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "method",
        "auto",
        ["auto", "histogram", "search", "search_h"],
        "from documents to coefficients: by their domains alone, or by a search from there, over "
        "coefficients or over domain weights; auto: search, unless the soup has more than 2 GiB",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "score",
        True,
        "of --recipe: compare losses on the documents with those at generic h",
        flag_values=values,
    )
    string("corpus", "", "the prepared corpus, if it was moved", flag_values=values)
    flags.DEFINE_integer(
        "average", 1, "the mean of so many checkpoints", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer("step", None, "checkpoint; default the newest", flag_values=values)


def run(values: flags.FlagValues) -> int:
    """Write specialists and say what their documents are like; returns the exit status."""
    for name in ("run", "recipe" if values.recipe else "documents", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is required")
    if values.recipe and (values.documents or values.method != "auto"):
        raise UserError("--recipe says documents and methods itself: leave out the other flags")
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    if values.recipe:
        return _run_many(values)
    from soup_jax.specialists.instantiate import instantiate_to

    made, nearest = instantiate_to(
        values.run,
        values.documents,
        values.out,
        method=values.method,
        step=values.step,
        average=values.average,
        corpus_dir=values.corpus,
        say=print,
    )
    histogram = made.histogram
    assert histogram is not None  # documents gave h
    print(f"{histogram.num_documents} documents, most like these domains of the corpus:")
    for label, weight in nearest:
        print(f"  {weight:6.1%}  {label}")
    if found := made.recipe.get("search"):
        print(_searched(found))
    for warning in histogram.warnings():
        print(f"warning: {warning}")
    print(f"specialist: {values.out}")
    return 0


def _searched(found: Mapping[str, Any]) -> str:
    if found["loss"] is None:
        return "search: one document, of which nothing can be held back: nothing was searched"
    return (
        f"search: {found['steps']} steps; documents held back: {found['start_loss']:.4f} -> "
        f"{found['loss']:.4f} nats per token"
    )


def _run_many(values: flags.FlagValues) -> int:
    from soup_jax.specialists import many

    lines = many.instantiate_many(
        values.run,
        values.recipe,
        values.out,
        score=values.score,
        step=values.step,
        average=values.average,
        corpus_dir=values.corpus,
        say=print,
    )
    for line in lines:
        for warning in line["warnings"]:
            print(f"warning: {line['name']}: {warning}")
    print(many.table(lines))
    there = sum(line["there"] for line in lines)
    print(f"specialists: {len(lines)} in {values.out}" + f", {there} there before" * bool(there))
    return 0
