"""A pool of processes on this machine, each with a set of cores or accelerators of its own.

A worker is a process that is given jobs one after another, as lines of JSON on its stdin, and
answers each with a line on its stdout (`soup_jax.cli.sweep_worker`). It ends itself when its stdin
is closed: a worker outlives this process by no more than one save.

A job that fails, or takes its worker down with it, ends no other. SIGTERM and SIGINT go on to the
workers, which save; a second SIGINT kills them.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import joblib

from soup_jax.errors import UserError
from soup_jax.hardware.compile_cache import NUM_THREADS

_JOB_BYTES = 2 << 30  # of memory that must be free for one more process, if nobody says how many


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a worker runs.

    Attributes:
      env: variables that it has beside ours.
      cores: of this machine, the only ones that it uses; (): all.
    """

    env: dict[str, str] = dataclasses.field(default_factory=dict)
    cores: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Job:
    """Commands that a worker carries out in order, until one fails.

    Attributes:
      name: for messages.
      commands: arguments of `soup-jax`.
      log: gets what they print, behind what it has.
      needs: a folder; where the first command leaves without it, the others are not carried out.
      config: its text, as `schema.to_text` gives it; the commands refuse another.
    """

    name: str
    commands: list[list[str]]
    log: pathlib.Path
    needs: str = ""
    config: str = ""


def slots(jobs: int, num_points: int, *, devices_per_job: int = 0) -> list[Slot]:
    """As many places as processes work at the same time.

    Args:
      jobs: how many; 0: one for each GPU, or for each core of a machine without accelerators while
        each has 2 GiB of free memory, and one in all on TPUs, whose chips one process holds.
      devices_per_job: GPUs that a job must have; 0: one, or an equal share of all for each of
        `jobs`, also where there are fewer points: how many there are changes nothing of one.

    Raises:
      UserError: there are fewer accelerators than that.
    """
    kind, devices = _accelerators()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = max(devices_per_job, 1)
    most = len(devices) // each if devices else 1 if kind else len(cores) or 1
    if jobs and kind and jobs > most:
        what = f"each takes {each} of {len(devices)} GPUs" if devices else "one holds all devices"
        raise UserError(f"--jobs={jobs}: at most {most} can work at the same time, for {what}")
    if most < 1:
        raise UserError(f"mesh.num_devices = {each}, but there are {len(devices)} GPUs here")
    if not kind:
        most = min(most, max(joblib.cpu_count(), 1), max(_free_memory() // _JOB_BYTES, 1))
    count = max(min(jobs or most, num_points), 1)
    if devices:
        share = devices_per_job or (len(devices) // jobs if jobs else 1)
        parts = [devices[i * share : (i + 1) * share] for i in range(count)]
        return [Slot({"CUDA_VISIBLE_DEVICES": ",".join(part)}) for part in parts]
    if kind or count == 1 or count > len(cores):
        return [Slot() for _ in range(count)]
    share = len(cores) // count
    # XLA cuts loops, and so sums, for as many threads as it has. That number stays the one of a run
    # that has all cores, and with it the bits.
    env = {NUM_THREADS: os.environ.get(NUM_THREADS, str(len(cores)))}
    return [Slot(env, tuple(cores[i * share : (i + 1) * share])) for i in range(count)]


def _free_memory() -> int:
    # In bytes, where Linux tells it.
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return sys.maxsize


def _accelerators() -> tuple[str, list[str]]:
    # Found without jax, which would take the devices for this process.
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if chosen.split(",")[0] == "cpu":
        return "", []
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if any(map(importlib.util.find_spec, plugins)) and (found := glob.glob("/dev/nvidia[0-9]*")):
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        if listed is None:
            return "gpu", [str(i) for i in range(len(found))]
        return ("gpu", [x.strip() for x in listed.split(",")]) if listed.strip() else ("", [])
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if importlib.util.find_spec("libtpu") and chips:
        return "tpu", []
    return "", []


class Pool:
    """Workers that do jobs.

    Attributes:
      stopped: the signal that ended it early, or "".
      errors: name of a job -> what was raised where it was to start, or its end to be noted.
    """

    def __init__(self, slots: Sequence[Slot], module: str):
        """`module` is what `python -m` runs as a worker."""
        self._slots, self._module = slots, module
        self.stopped = ""
        self.errors: dict[str, Exception] = {}
        self._lock = threading.RLock()  # a signal may arrive while this thread holds it
        self._workers: set[subprocess.Popen[str]] = set()

    def run(
        self,
        jobs: Sequence[Job],
        *,
        started: Callable[[Job], object],
        ended: Callable[[Job, int], object],
    ) -> None:
        """Does the jobs, in their order as far as places are free.

        Args:
          started: called before a job.
          ended: called after one with its exit status, or minus the number of the signal that
            killed its worker. Not called for jobs that a stop has left undone. Both are called
            one at a time, in any thread. What they raise ends no other job.

        Raises:
          KeyboardInterrupt: at a second SIGINT.
        """
        left = iter(jobs)
        with _signals(self._stop), ThreadPoolExecutor(len(self._slots)) as threads:
            working = [threads.submit(self._serve, s, left, started, ended) for s in self._slots]
            for each in working:
                each.result()

    def _serve(
        self,
        slot: Slot,
        left: Iterator[Job],
        started: Callable[[Job], object],
        ended: Callable[[Job, int], object],
    ) -> None:
        worker = None
        try:
            while True:
                with self._lock:
                    job = None if self.stopped else next(left, None)
                    if job is None:
                        return
                    try:
                        worker = worker or self._start(slot)
                        started(job)
                    except Exception as e:
                        self.errors[job.name] = e
                        continue
                status = _ask(worker, job)
                alive = status is not None
                if status is None:
                    status = worker.wait()
                with self._lock:
                    # What a stop has cut short is neither done nor failed.
                    try:
                        if not self.stopped:
                            ended(job, status)
                    except Exception as e:
                        self.errors[job.name] = e
                if not alive or status == _CRASHED:
                    self._end(worker)
                    worker = None
        finally:
            if worker is not None:
                self._end(worker)

    def _start(self, slot: Slot) -> "subprocess.Popen[str]":
        # In a session of its own: Ctrl-C in a terminal reaches this process alone, which passes it
        # on once.
        worker = subprocess.Popen(
            [sys.executable, "-m", self._module, ",".join(map(str, slot.cores))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **slot.env},
            start_new_session=True,
        )
        self._workers.add(worker)
        return worker

    def _end(self, worker: "subprocess.Popen[str]") -> None:
        assert worker.stdin is not None
        assert worker.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()
        worker.wait()
        worker.stdout.close()
        with self._lock:
            self._workers.discard(worker)

    def _stop(self, number: int, again: bool) -> None:
        with self._lock:
            self.stopped = self.stopped or signal.Signals(number).name
            for worker in self._workers:
                worker.send_signal(signal.SIGKILL if again else signal.SIGTERM)
        if again:
            raise KeyboardInterrupt


_CRASHED = 70  # EX_SOFTWARE of sysexits.h: a bug, after which the worker is not to be trusted


def _ask(worker: "subprocess.Popen[str]", job: Job) -> int | None:
    # The exit status of the job, None if the worker is gone.
    assert worker.stdin is not None
    assert worker.stdout is not None
    request = json.dumps({**dataclasses.asdict(job), "log": str(job.log)})
    try:
        worker.stdin.write(request + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
    except BrokenPipeError:
        return None
    return int(answer) if answer.strip() else None


@contextlib.contextmanager
def _signals(stop: Callable[[int, bool], None]) -> Iterator[None]:
    # Both ask to stop; SIGINT that comes after another signal asks to stop at once.
    seen: list[int] = []

    def handler(number: int, _: Any) -> None:
        again = number == signal.SIGINT and signal.SIGINT in seen
        seen.append(number)
        stop(number, again)

    old = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
