"""A run that diverged: what its step read, and what the user can do then."""

import math
from typing import Any

import numpy as np

from soup_jax.training.setup import Run


def report(run: Run, step: int) -> dict[str, Any]:
    """What the bad step read: its domains, domain weights and windows, and its step of the plan."""
    plan = run.plan[step]
    domains, counts = np.unique(plan.domain_B, return_counts=True)
    return {
        "step": step,
        "plan_step": run.plan.index(step),
        "domains": {
            str(k): {"label": run.corpus.label(int(k)), "windows": int(n)}
            for k, n in zip(domains, counts)
        },
        "h": plan.h_MK.tolist(),
        "domain": plan.domain_B.tolist(),
        "window": plan.window_B.tolist(),
    }


def advice(run: Run, step: int, *, saved: list[int]) -> str:
    """Commands that go on: without the batch, or from an earlier step of those `saved`.

    The state before the bad step is saved, and its gradient depends on no rate: with the same batch
    it would fail again.
    """
    index, rate = run.plan.index(step), f"--config.optimizer.learning_rate={_half_rate(run)}"
    skip = tuple(sorted([*run.cfg.skip_batches, (index, index)]))
    lines = [
        "The same command continues without this batch, at half the rate, if you add",
        f'  --accept_changes --config.skip_batches="{skip}" {rate}',
    ]
    if any(s < step for s in saved):
        lines += ["If the loss had grown before:", earlier(run, step, saved=saved)]
    return "\n".join(lines)


def earlier(run: Run, step: int, *, saved: list[int]) -> str:
    """The command that starts a new run from a step of those `saved` before `step`, if any."""
    rate = f"--config.optimizer.learning_rate={_half_rate(run)}"
    before = [s for s in saved if s < step]
    if not before:
        return f"No checkpoint is older: start again with another --workdir and {rate}"
    source = f"--config.checkpoint.init_from={run.home.place}"
    return (
        "A new run starts from an earlier step with\n"
        f"  --workdir=NEW {source} --config.checkpoint.init_step={before[-1]} {rate}"
    )


def limit(vocab_size: int, first_loss: float | None) -> tuple[float, str]:
    """The loss in nats per target above which a run has diverged, and what it is.

    Spikes stay below three times the loss of a uniform guess. A network may begin above it.
    """
    guess = 3 * math.log(vocab_size)
    if first_loss is not None and 1.5 * first_loss > guess:
        return 1.5 * first_loss, "1.5 times the loss of the first step"
    return guess, f"three times that of guessing among the {vocab_size} tokens"


def _half_rate(run: Run) -> str:
    return f"{run.cfg.optimizer.learning_rate / 2:.3g}"
