"""`soup-jax generate`: continue a prompt with a specialist.

    soup-jax generate --model=specialist --prompt='Once upon a time'

The model is a folder that `soup-jax instantiate` wrote.
"""

from collections.abc import Sequence

from absl import flags

from soup_jax.errors import UserError


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    flags.DEFINE_string("model", "", "folder that `instantiate` wrote", flag_values=values)
    flags.DEFINE_string("prompt", "", "text to continue", flag_values=values)
    flags.DEFINE_integer("max_tokens", 100, "tokens to add", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "temperature", 0.8, "0 takes the likeliest token", lower_bound=0.0, flag_values=values
    )
    flags.DEFINE_integer(
        "seed",
        0,
        "of the sampling",
        lower_bound=0,
        upper_bound=(1 << 32) - 1,
        flag_values=values,
    )


def run(values: flags.FlagValues) -> int:
    """Print the prompt and its continuation; returns the exit status."""
    if not values.model:
        raise UserError("--model=DIR is required: a folder that `soup-jax instantiate` wrote")
    try:
        values.prompt.encode()
    except UnicodeEncodeError as e:
        raise UserError("--prompt is not UTF-8 text") from e
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    from soup_jax.specialists.specialist import Specialist

    continuation = Specialist.load(values.model).generate(
        values.prompt,
        max_tokens=values.max_tokens,
        temperature=values.temperature,
        seed=values.seed,
    )
    print(values.prompt + continuation)
    return 0
