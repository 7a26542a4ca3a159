"""Trackers: where the numbers of a run go beside metrics.jsonl.

`log.trackers` names them: ours by name, or yours as `package.module:make`, where
`make(cfg, *, workdir, start_step)` returns a `Tracker`. They exist in process 0 only, and one that
fails never stops a run.
"""

import importlib
import importlib.util
import logging
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ml_collections import ConfigDict

from soup_jax.errors import UserError
from soup_jax.registry import Registry

_log = logging.getLogger(__name__)

_FLUSH_SECS = 30.0  # after which TensorBoard sees what was logged


class Tracker(Protocol):
    """Takes the numbers of a run, step by step."""

    def log(self, step: int, values: Mapping[str, float], kind: str) -> None:
        """The numbers of one line of metrics.jsonl; `kind` is "train" or "evaluation".

        After a kill the steps since the last checkpoint come a second time, with the same numbers.
        """
        ...

    def close(self) -> None:
        """The run ends or pauses here."""
        ...


class TensorBoard:
    """Event files in `<workdir>/tensorboard`."""

    def __init__(self, cfg: ConfigDict, *, workdir: pathlib.Path, start_step: int):
        """Events after `start_step` are no longer shown."""
        # Not its SummaryWriter: the thread of that dies of a full disk, and `close` waits for it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        restart = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=start_step + 1, session_log=restart))
        self._flushed = time.monotonic()

    def log(self, step: int, values: Mapping[str, float], kind: str) -> None:
        """One scalar `kind/name` for each value."""
        for name, value in values.items():
            summary = self._scalar(f"{kind}/{name}", value)
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > _FLUSH_SECS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class ModuleTracker:
    """A module with the functions of wandb: `init`, `log` and `finish`.

    The project is that of WANDB_PROJECT or TRACKIO_PROJECT, else soup_jax. The run is known by the
    name in `<workdir>/tracker_id`, so a folder that is continued continues its curves.
    """

    module: str

    def __init__(self, cfg: ConfigDict, *, workdir: pathlib.Path, start_step: int):
        """Open the run, or continue it."""
        self._module = importlib.import_module(self.module)
        file = workdir / "tracker_id"
        if not file.exists():
            file.write_text(f"{cfg.name}-{uuid.uuid4().hex[:8]}", encoding="utf-8")
        name = file.read_text(encoding="utf-8")
        self._module.init(
            project=os.environ.get(f"{self.module.upper()}_PROJECT", "soup_jax"),
            name=name,
            config=cfg.to_dict(),
            resume="allow",
            **self._options(name, workdir),
        )

    def _options(self, name: str, workdir: pathlib.Path) -> dict[str, Any]:
        return {}

    def log(self, step: int, values: Mapping[str, float], kind: str) -> None:
        """All values at once, as `kind/name`."""
        self._module.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._module.finish()


class Wandb(ModuleTracker):
    """Weights & Biases; its environment variables hold, such as WANDB_MODE=offline."""

    module = "wandb"

    def _options(self, name: str, workdir: pathlib.Path) -> dict[str, Any]:
        return {"id": name, "dir": str(workdir)}


class Trackio(ModuleTracker):
    """Trackio: local, or on a Hugging Face Space."""

    module = "trackio"


TRACKERS: Registry[Callable[..., Tracker]] = Registry(
    "tracker", {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
)


def find(names: Sequence[str]) -> list[Callable[..., Tracker]]:
    """What makes the trackers of these names or dotted paths.

    Raises:
      UserError: one does not exist, or needs a package that is not installed.
    """
    found = [TRACKERS.get(name) for name in names]
    for make in found:
        module = getattr(make, "module", None)
        if module and module not in sys.modules and not importlib.util.find_spec(module):
            raise UserError(
                f"log.trackers names {module}, which is not installed: "
                f"pip install {module}, or leave it out"
            )
    return found


class Trackers:
    """All trackers of a run; one that fails is left out from then on, with a warning."""

    def __init__(self, cfg: ConfigDict, *, workdir: pathlib.Path, start_step: int):
        """Open those of `log.trackers`."""
        self._open: dict[str, Tracker] = {}
        for name, make in zip(cfg.log.trackers, find(cfg.log.trackers)):
            try:
                self._open[name] = make(cfg, workdir=workdir, start_step=start_step)
            except Exception as e:
                _log.warning("the tracker %s cannot start: %s", name, e)

    def log(self, step: int, values: Mapping[str, float], kind: str) -> None:
        """Give the numbers to all."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(step, values, kind)
            except Exception as e:
                _log.warning("the tracker %s failed and is left out from here: %s", name, e)
                del self._open[name]

    def close(self) -> None:
        """Close all."""
        for name, tracker in self._open.items():
            try:
                tracker.close()
            except Exception as e:
                _log.warning("the tracker %s may be incomplete: %s", name, e)
