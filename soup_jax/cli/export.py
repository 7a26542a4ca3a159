"""`soup-jax export`: a specialist for other libraries.

    soup-jax export --model=specialist --format=hf --out=specialist-hf

The model is a folder that `soup-jax instantiate` wrote. hf is a folder for transformers and vLLM;
where transformers is installed, it is loaded and compared. gguf is a file for llama.cpp. lora is a
PEFT adapter, of a soup with low-rank experts, on the shared parameters of its run:

    soup-jax export --run=RUN --format=hf --out=shared-hf
    soup-jax export --model=specialist --format=lora --base=shared-hf --out=specialist-lora
"""

from collections.abc import Sequence

from absl import flags

from soup_jax.errors import UserError


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    string = flags.DEFINE_string
    string("model", "", "folder that `instantiate` wrote", flag_values=values)
    string(
        "format", "hf", "hf, gguf, lora, or package.module:function of yours", flag_values=values
    )
    string("out", "", "folder that is written; an older export is replaced", flag_values=values)
    string(
        "run",
        "",
        "without --model: its shared parameters are exported; of lora: the run, if it was moved",
        flag_values=values,
    )
    string("corpus", "", "the run's prepared corpus, if it was moved", flag_values=values)
    string("base", "", "of lora: folder or name of the shared parameters", flag_values=values)
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16", "float16"],
        "of the parameters in the files; default float32",
        flag_values=values,
    )


def run(values: flags.FlagValues) -> int:
    """Write the export; returns the exit status."""
    if not values.out:
        raise UserError("--out is required")
    if not (values.model or values.run):
        raise UserError("--model=DIR is required: a folder that `soup-jax instantiate` wrote")
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    from soup_jax.specialists.export import FORMATS
    from soup_jax.specialists.open import load
    from soup_jax.specialists.specialist import Specialist

    FORMATS.get(values.format)
    names = ["dtype", "base", *(("run", "corpus") if values.model else ())]
    options = {name: values[name].value for name in names if values[name].value}
    if values.model:
        source = Specialist.load(values.model)
    else:
        source = load(values.run, corpus_dir=values.corpus).shared()
    source.save(values.out, format=values.format, **options)
    print(f"export: {values.out}")
    return 0
