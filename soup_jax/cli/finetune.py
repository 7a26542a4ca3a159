"""`soup-jax finetune`: train a specialist on, on its own documents.

    soup-jax finetune --model=specialist --documents=mine.jsonl --out=better

With `--run` instead of `--model` it starts from that soup at the natural frequencies of its
domains. The result is a specialist like any other: `generate`, `score` and `export` take it.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from soup_jax.errors import UserError
from soup_jax.storage import refuse_address


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    string = flags.DEFINE_string
    string("model", "", "folder that `instantiate` wrote", flag_values=values)
    string("run", "", "instead: a run or soup folder, at its generic h", flag_values=values)
    flags.DEFINE_multi_string(
        "documents", [], "file, folder or glob; may be repeated", flag_values=values
    )
    string("out", "", "folder the specialist is written to", flag_values=values)
    string("text_field", "text", "of a JSON line or Parquet row", flag_values=values)
    flags.DEFINE_float("learning_rate", 1e-3, "of AdamW", lower_bound=0.0, flag_values=values)
    flags.DEFINE_integer("max_steps", 1000, "most steps", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "rank", 0, "of LoRA; 0 trains all parameters", lower_bound=0, flag_values=values
    )
    flags.DEFINE_integer(
        "seed",
        0,
        "of the order of windows, and of low-rank factors",
        lower_bound=0,
        upper_bound=(1 << 32) - 1,
        flag_values=values,
    )


def run(values: flags.FlagValues) -> int:
    """Write the trained specialist; returns the exit status."""
    for name in ("documents", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is required")
    if bool(values.model) == bool(values.run):
        raise UserError("--model=DIR or --run=RUN is required, and not both")
    for path in values.documents:
        refuse_address(path, "--documents", objects=True)
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    from soup_jax.evaluation.sample import read_sample
    from soup_jax.specialists import export
    from soup_jax.specialists.finetune import finetune
    from soup_jax.specialists.open import load
    from soup_jax.specialists.specialist import Specialist

    export.check_target(pathlib.Path(values.out))
    sample = read_sample(values.documents, text_field=values.text_field)
    for line in [*sample.summary(), *sample.damage]:
        print(line)
    start = Specialist.load(values.model) if values.model else load(values.run).generic()
    made = finetune(
        start,
        [d.text for d in sample.documents],
        learning_rate=values.learning_rate,
        max_steps=values.max_steps,
        rank=values.rank,
        seed=values.seed,
        say=print,
    )
    made.save(values.out)
    found = made.recipe["finetuned"]
    print(
        f"documents held back: {found['start_loss']:.4f} -> {found['loss']:.4f} nats per token, "
        f"after {found['steps']} steps"
    )
    print(f"specialist: {values.out}")
    return 0
