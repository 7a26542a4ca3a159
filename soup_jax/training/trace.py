"""A profiler trace of some steps, for TensorBoard's profiler, xprof or Perfetto.

The parts of a step have names in it: merge, forward_backward, bank_gradients, update_shared,
update_bank.
"""

import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
from ml_collections import ConfigDict

_log = logging.getLogger(__name__)


def traced(
    steps: Iterable[int], cfg: ConfigDict, workdir: pathlib.Path, wait: Callable[..., None]
) -> Iterator[int]:
    """`steps`, counted from 0; those of `log.profile`, counted from 1, leave a trace in
    WORKDIR/profile, a part of it by each process.

    Args:
      wait: with ahead=0, returns when the steps that were sent are done.
    """
    first, last = cfg.log.profile or (0, 0)
    folder, tracing = workdir / "profile", False
    try:
        for step in steps:
            if not tracing and first <= step + 1 <= last:
                wait(ahead=0)  # for those before, which belong to no trace
                jax.profiler.start_trace(folder)
                tracing = True
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                yield step
            if tracing and step + 1 == last:
                wait(ahead=0)
                tracing = _stop(folder)
    finally:
        if tracing:
            _stop(folder)


def _stop(folder: pathlib.Path) -> bool:
    jax.profiler.stop_trace()
    _log.info("profiler trace: %s (tensorboard --logdir=%s)", folder, folder.parent)
    return False
