"""`soup-jax score`: how well models predict documents, each by itself.

    soup-jax score --model=specialist --documents=mine.jsonl --run=runs/quickstart/soup

Each `--model` is a folder that `soup-jax instantiate` wrote, and a column. `--run` adds that run or
soup folder at the natural frequencies of its domains, as `generic_h`.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from soup_jax.errors import UserError
from soup_jax.storage import check_file_target, nulled, refuse_address, write_json

_SHOWN = 20


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    string, multi = flags.DEFINE_string, flags.DEFINE_multi_string
    multi("model", [], "folder of a specialist; may be repeated: columns", flag_values=values)
    multi("documents", [], "file, folder or glob; may be repeated", flag_values=values)
    string("run", "", "run or soup folder, for the column generic_h", flag_values=values)
    string("text_field", "text", "of a JSON line or Parquet row", flag_values=values)
    string("json", "", "a file that gets the numbers of every document", flag_values=values)


def run(values: flags.FlagValues) -> int:
    """Print a line for each document, and one for all; returns the exit status."""
    if not values.documents or not (values.model or values.run):
        raise UserError("--documents and a --model=DIR (or --run=RUN) are required")
    for flag in ("model", "documents"):
        for path in values[flag].value or ():
            refuse_address(path, f"--{flag}", objects=True)
    if values.json:
        check_file_target(values.json, "--json")
    names = [pathlib.Path(path).resolve().name for path in values.model]
    names += ["generic_h"] * bool(values.run)
    if len(set(names)) != len(names):
        raise UserError(f"the columns {names} are not all different; rename a --model folder")
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    from soup_jax.evaluation import score
    from soup_jax.evaluation.sample import read_sample
    from soup_jax.specialists.open import load
    from soup_jax.specialists.specialist import Specialist

    sample = read_sample(values.documents, text_field=values.text_field)
    for read in [*sample.summary(), *sample.damage]:
        print(read)
    models = [Specialist.load(path) for path in values.model]
    models += [load(values.run).generic()] if values.run else []
    texts = [d.text for d in sample.documents]
    columns = {name: model.score(texts) for name, model in zip(names, models)}
    print(score.table(texts, columns, most=_SHOWN))
    if values.json:
        sources = [{"source": document.source} for document in sample.documents]
        write_json(values.json, nulled(score.as_json(columns, sources)))
        print(f"numbers: {values.json}")
    return 0
