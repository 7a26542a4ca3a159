"""`soup-jax generate`: continue a prompt with a specialist.

    soup-jax generate --model=specialist --prompt='Once upon a time'

The model is a folder that `soup-jax instantiate` wrote. `--prompts=FILE` continues many prompts
together, and prints a line {"prompt": ..., "text": ...} for each.
"""

import json
from collections.abc import Sequence

from absl import flags

from soup_jax.errors import UserError


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    flags.DEFINE_string("model", "", "folder that `instantiate` wrote", flag_values=values)
    flags.DEFINE_string("prompt", "", "text to continue", flag_values=values)
    flags.DEFINE_string(
        "prompts",
        "",
        'instead of --prompt: file, folder or glob of prompts, such as JSON lines {"text": ...}',
        flag_values=values,
    )
    flags.DEFINE_integer("max_tokens", 100, "tokens to add", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "temperature", 0.8, "0 takes the likeliest token", lower_bound=0.0, flag_values=values
    )
    flags.DEFINE_float(
        "top_p",
        1.0,
        "draw from the likeliest tokens that have this much of the probability together",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "stop", [], "end before this text; may be repeated", flag_values=values
    )
    flags.DEFINE_integer(
        "seed",
        0,
        "of the sampling; of prompt i of --prompts, i more",
        lower_bound=0,
        upper_bound=(1 << 32) - 1,
        flag_values=values,
    )


def run(values: flags.FlagValues) -> int:
    """Print prompts and their continuations; returns the exit status."""
    if not values.model:
        raise UserError("--model=DIR is required: a folder that `soup-jax instantiate` wrote")
    if values.prompt and values.prompts:
        raise UserError("--prompt and --prompts are both given; one is meant")
    for name, texts in (("prompt", [values.prompt]), ("stop", values.stop)):
        try:
            [text.encode() for text in texts]
        except UnicodeEncodeError as e:
            raise UserError(f"--{name} is not UTF-8 text") from e
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    from soup_jax.evaluation.sample import read_sample
    from soup_jax.specialists.decoding import Sampling
    from soup_jax.specialists.specialist import Specialist

    prompts = [values.prompt]
    if values.prompts:
        prompts = [d.text for d in read_sample([values.prompts], text_field="text").documents]
    added = Specialist.load(values.model).generate_batch(
        prompts,
        max_tokens=values.max_tokens,
        sampling=Sampling(temperature=values.temperature, top_p=values.top_p, seed=values.seed),
        stop=values.stop,
    )
    for prompt, text in zip(prompts, added):
        if values.prompts:
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
        else:
            print(prompt + text)
    return 0
