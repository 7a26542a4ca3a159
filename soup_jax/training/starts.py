"""Which commands made a run: when each start began and ended, on what, and where its time went.

A run's `starts.jsonl` has a line for each start,

    {"command", "began", "until", "end", "first_step", "step", "seconds": {PHASE: SECONDS},
     "devices", "versions"}

which is brought up to date before each save. `end` is "" while it trains, and stays so if it is
killed. No number of a run depends on this file, so nothing that is wrong with it stops a run.
"""

import contextlib
import importlib.metadata
import json
import logging
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import Any

import jax

from soup_jax import command, inputs
from soup_jax import storage as files
from soup_jax.errors import UserError
from soup_jax.processes.group import Solo

_log = logging.getLogger(__name__)

NAME = "starts.jsonl"
_PACKAGES = ("soup_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def _now(earlier: float = 0.0) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - earlier))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class Record:
    """This start's line in the run's `starts.jsonl`; nothing is written before `begin`."""

    def __init__(self) -> None:
        self._path: pathlib.Path | None = None
        self._earlier, self._line = "", dict[str, Any]()

    def begin(self, workdir: pathlib.Path, group: Solo, *, step: int) -> None:
        """Note that the run goes on from `step`; process 0 alone may call this."""
        self._path, self._group = workdir / NAME, group
        try:
            if self._path.exists():
                text = inputs.read_text(self._path)
                self._earlier = text if text.endswith("\n") or not text else f"{text}\n"
        except UserError as e:
            _log.warning("%s. This start is not recorded there", e)
            self._path = None
            return
        devices, spent = jax.devices(), group.seconds_until_now()
        self._line = {
            "command": command.words(),
            "began": _now(sum(spent.values())),
            "first_step": step,
            "devices": {
                "kind": devices[0].device_kind,
                "count": len(devices),
                "processes": jax.process_count(),
            },
            "versions": _versions(),
        }
        self._write("")

    def update(self) -> None:
        """Bring the line up to date."""
        if self._line:
            self._write("")

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Notes how the block ends."""
        end = "done"
        try:
            yield
        except BaseException as e:
            end = f"{type(e).__name__}: {e}"[:1000]
            raise
        finally:
            if self._line:
                self._write(end)

    def _write(self, end: str) -> None:
        if self._path is None:
            return
        spent = self._group.seconds_until_now()
        seconds = {phase: round(s, 3) for phase, s in spent.items()}
        step = max(self._group.place["step"], self._line["first_step"])
        now = {"until": _now(), "end": end, "step": step, "seconds": seconds}
        try:
            files.write_text(self._path, self._earlier + json.dumps({**self._line, **now}) + "\n")
        except OSError as e:  # what stops the run is for its save to tell
            _log.warning("%s is not brought up to date: %s", self._path, e)
