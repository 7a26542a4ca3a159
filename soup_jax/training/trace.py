"""A profiler trace of some steps, for TensorBoard's profiler, xprof or Perfetto.

The parts of a step have names in it: merge, forward_backward, bank_gradients, update_shared,
update_bank.
"""

import logging
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from soup_jax.training.meter import Meter

_log = logging.getLogger(__name__)


def traced(
    start: int, cfg: ConfigDict, workdir: pathlib.Path, wait: Callable[..., None], meter: Meter
) -> Iterator[int]:
    """The steps from `start` to `num_steps`, counted from 0; those of `log.profile`, counted from
    1, leave a trace in WORKDIR/profile, a part of it by each process.

    Args:
      wait: with ahead=0, returns when the steps that were sent are done.
      meter: does not count the time that the profiler takes to start and to write.
    """
    first, last = cfg.log.profile or (0, 0)
    if cfg.log.profile and not range(max(first, start + 1), min(last, cfg.num_steps) + 1):
        _log.warning("no trace: steps %d to %d are not among those to come", first, last)
    folder, tracing = workdir / "profile", False
    try:
        for step in range(start, cfg.num_steps):
            if not tracing and first <= step + 1 <= last:
                wait(ahead=0)  # for those before, which belong to no trace
                before = time.perf_counter()
                jax.profiler.start_trace(folder)
                tracing = True
                meter.skip(time.perf_counter() - before)
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                yield step
            if tracing and step + 1 == last:
                wait(ahead=0)
                before = time.perf_counter()
                tracing = _stop(folder)
                meter.skip(time.perf_counter() - before)
    finally:
        if tracing:
            _stop(folder)


def _stop(folder: pathlib.Path) -> bool:
    jax.profiler.stop_trace()
    _log.info("profiler trace: %s (tensorboard --logdir=%s)", folder, folder.parent)
    return False
