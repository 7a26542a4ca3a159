"""Jobs in processes of their own, for code that holds the GIL, such as scikit-learn's."""

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import threadpoolctl

from soup_jax.errors import UserError


def parallel_map(
    function: Callable[..., Any], jobs: Sequence[tuple], *, num_workers: int
) -> Iterator[Any]:
    """`function(*job)` for every job, in order, in fresh processes (here when one is enough).

    Workers are started by loky, not forked (forking after JAX has started threads deadlocks), do
    not import the caller's `__main__`, use one thread each, and end when this process does.
    """
    if num_workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            with threadpoolctl.threadpool_limits(1):
                result = function(*job)
            yield result
        return
    import joblib

    # loky replaces a worker that has grown, which is what it should do, and warns about it here.
    warnings.filterwarnings("ignore", message="A worker stopped while", category=UserWarning)
    parallel = joblib.Parallel(n_jobs=min(num_workers, len(jobs)), return_as="generator")
    parent = os.getpid()
    try:
        yield from parallel(joblib.delayed(_in_worker)(function, job, parent) for job in jobs)
    except joblib.externals.loky.process_executor.TerminatedWorkerError as e:
        raise UserError(
            "a worker process was killed, most likely because the memory is full. Run the same "
            "command again with a smaller --config.corpus.num_workers; it continues where it was"
        ) from e


_watched: set[int] = set()


def _in_worker(function: Callable[..., Any], job: tuple, parent: int) -> Any:
    os.environ["RAYON_NUM_THREADS"] = "1"  # of `tokenizers`, read at its first use
    if "jax" in sys.modules:  # an accelerator belongs to one process
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    os.environ["JAX_PLATFORMS"] = "cpu"
    if parent not in _watched:
        _watched.add(parent)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with threadpoolctl.threadpool_limits(1):
        return function(*job)


def _end_with(parent: int) -> None:
    # A parent killed by SIGKILL cannot stop its workers; they would write into a folder that a
    # restarted run is already using.
    while os.getppid() == parent:
        time.sleep(0.05)
    os._exit(1)
