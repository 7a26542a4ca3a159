"""`soup-jax export`: a specialist for other libraries.

    soup-jax export --model=specialist --format=hf --out=specialist-hf

The model is a folder that `soup-jax instantiate` wrote. hf is a folder for transformers and vLLM;
where transformers is installed, it is loaded and compared. gguf is a file for llama.cpp.
"""

from collections.abc import Sequence

from absl import flags

from soup_jax.errors import UserError


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    string = flags.DEFINE_string
    string("model", "", "folder that `instantiate` wrote", flag_values=values)
    string("format", "hf", "hf, gguf, or package.module:function of yours", flag_values=values)
    string("out", "", "folder that is written; an older export is replaced", flag_values=values)
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16", "float16"],
        "of the parameters in the files; default float32",
        flag_values=values,
    )


def run(values: flags.FlagValues) -> int:
    """Write the export; returns the exit status."""
    for name in ("model", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is required")
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    from soup_jax.specialists.specialist import Specialist

    options = {"dtype": values.dtype} if values.dtype else {}
    Specialist.load(values.model).save(values.out, format=values.format, **options)
    print(f"export: {values.out}")
    return 0
