"""Sums since the last line of metrics: on the device, with the host's clock and batches beside.

A checkpoint holds those between two lines, so that a run which goes on from it writes the lines of
one that never stopped; and the loss that the run began with.
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
    """Sums of the steps since the last line, and how long they took.

    Attributes:
      first_loss: of the run's first step, in nats per target; None: not known yet. The first that a
        run of an earlier version does here counts as its first.
    """

    def __init__(self, mesh: Mesh, num_domains: int):
        self._sharding = layout.replicated(mesh)
        self._zeros = jax.jit(
            lambda: train_step.zero_metrics(num_domains), out_shardings=self._sharding
        )
        self._mark = time.perf_counter()
        self.first_loss: float | None = None
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

    def note_first(self) -> None:
        """Read the loss of the sums if `first_loss` is not known; waits for their steps."""
        if self.first_loss is None:
            loss, targets = (
                np.asarray(self.sums[f"domain_{x}"]).sum() for x in ("loss", "targets")
            )
            if np.isfinite(loss) and targets > 0:
                self.first_loss = float(loss / targets)

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

    def state(self) -> dict[str, Any]:
        """`first_loss` and the unfinished interval, if there is one, ready for JSON. Waits for its
        steps."""
        return {"first_loss": self.first_loss, **self._interval()}

    def _interval(self) -> dict[str, Any]:
        if not self.steps:
            return {}
        sums = {name: np.asarray(value).tolist() for name, value in self.sums.items()}
        if not all(math.isfinite(x) for value in sums.values() for x in np.ravel(value).tolist()):
            return {}
        seconds = time.perf_counter() - self._mark
        return {"sums": sums, "steps": self.steps, "seconds": seconds, "wait": self.wait}

    def restore(self, state: Mapping[str, Any] | None, plan: SamplingPlan, *, step: int) -> None:
        """Go on with what `state` returned after `step` steps; None: with a new interval."""
        self.reset()
        state = state or {}
        self.first_loss = state.get("first_loss")
        if state.get("sums", {}).keys() != self.sums.keys():  # none, or of another version
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
