"""Sums since the last line of metrics: on the device, with the host's clock and batches beside.

A checkpoint between two lines holds them, so that a run which goes on from it writes the lines of
one that never stopped.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from soup_jax.data.sampling import SamplingPlan, StepPlan
from soup_jax.soup import layout
from soup_jax.training import metrics
from soup_jax.training import step as train_step


class Meter:
    """Sums of the steps since the last line, and how long they took."""

    def __init__(self, mesh: Mesh, num_domains: int):
        self._sharding = layout.replicated(mesh)
        self._zeros = jax.jit(
            lambda: train_step.zero_metrics(num_domains), out_shardings=self._sharding
        )
        self._mark = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        """Begin an interval."""
        self.sums, self.wait, self.steps = self._zeros(), 0.0, 0
        self._batches = metrics.BatchHash()

    def feed(self, plan: StepPlan, wait: float) -> None:
        """Note a batch and the seconds that the loop waited for it."""
        self._batches.add(plan.domain_B, plan.window_B)
        self.wait += wait
        self.steps += 1

    def close(self, step: int) -> dict[str, Any]:
        """A finished interval, to be read after the next step is under way; starts a new one."""
        done = {"step": step, "sums": self.sums, "wait": self.wait, "hash": self._batches.hex()}
        self.reset()
        return done

    def lap(self) -> float:
        """Seconds since the last lap. Call it when the device is done with an interval: the host
        may have sent steps that are yet to run."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds

    def skip(self, seconds: float) -> None:
        """Leave out time that was not spent on steps."""
        self._mark += seconds

    def state(self) -> dict[str, Any] | None:
        """The unfinished interval, ready for JSON; None if there is none. Waits for its steps."""
        if not self.steps:
            return None
        sums = {name: np.asarray(value).tolist() for name, value in self.sums.items()}
        if not all(math.isfinite(x) for value in sums.values() for x in np.ravel(value).tolist()):
            return None
        seconds = time.perf_counter() - self._mark
        return {"sums": sums, "steps": self.steps, "seconds": seconds, "wait": self.wait}

    def restore(self, state: Mapping[str, Any] | None, plan: SamplingPlan, *, step: int) -> None:
        """Go on with an interval that `state` returned after `step` steps; None: with a new one."""
        self.reset()
        if state is None or state["sums"].keys() != self.sums.keys():  # of another version
            return
        for i in range(step - state["steps"], step):
            self.feed(plan[i], 0.0)
        self.wait = state["wait"]
        self._mark = time.perf_counter() - state["seconds"]
        for name, zero in self.sums.items():
            value = np.asarray(state["sums"][name], zero.dtype).reshape(zero.shape)
            self.sums[name] = jax.make_array_from_callback(
                zero.shape, self._sharding, value.__getitem__
            )
