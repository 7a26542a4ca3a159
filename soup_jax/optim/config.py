"""The settings of a soup's optimizers, and the learning rate as a function of the step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from soup_jax.shapes import Array

Schedule = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Static settings; experiments/base.py says what each means.

    Attributes:
      num_steps: updates of the whole run, where the schedule ends.
      shared: of the shared parameters and the router; see `shared`.
      shared_args: (name, value) pairs that it gets.
      bank: of experts whose gradients are factored; see `bank`.
      stochastic_rounding: of what is stored in bfloat16; else to the nearest.
    """

    learning_rate: Array | float
    num_steps: int
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_fraction: float = 0.1
    shared: str = "adamw"
    shared_args: tuple[tuple[str, Any], ...] = ()
    bank: str = "merged"
    bank_lr_scale: float = 0.3
    bank_step_bound: float = 4.5
    router_lr_scale: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: str = "float32"
    stochastic_rounding: bool = True


def schedule(config: OptimizerConfig) -> Schedule:
    """Learning rate of the shared parameters as a function of the updates already applied."""
    c = config
    # Warm-up reaches its peak at `warmup_steps`; step 0 has a rate above zero, so no batch is lost.
    warmup = optax.linear_schedule(
        c.learning_rate / (c.warmup_steps + 1), c.learning_rate, max(c.warmup_steps, 1)
    )
    rest = max(c.num_steps - c.warmup_steps, 1)
    if c.schedule == "cosine":
        main = optax.cosine_decay_schedule(c.learning_rate, rest, c.final_fraction)
        return optax.join_schedules([warmup, main], [c.warmup_steps])
    flat = optax.constant_schedule(c.learning_rate)
    if c.schedule == "constant":
        return optax.join_schedules([warmup, flat], [c.warmup_steps])
    decay = optax.linear_schedule(
        c.learning_rate, c.learning_rate * c.final_fraction, max(c.decay_steps, 1)
    )
    start = max(c.num_steps - c.decay_steps, c.warmup_steps)
    return optax.join_schedules([warmup, flat, decay], [c.warmup_steps, start])
