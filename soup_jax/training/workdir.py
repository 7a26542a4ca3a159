"""Where a run lies: in a folder of a file system, or in a bucket.

In a bucket orbax writes the checkpoints at their address. All else is small: a temporary folder
here has it, which is filled at each start and copied to the bucket before each save.
"""

import contextlib
import logging
import os
import pathlib
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from typing import Any

from soup_jax import inputs, places, remote
from soup_jax import storage as files
from soup_jax.errors import UnavailableError, UserError

_log = logging.getLogger(__name__)

_CLAIM = ".claim"  # the object that names who trains there
_CLAIM_HOLDS = {"host": str, "pid": int, "since": str}


def check(place: str | os.PathLike) -> None:
    """Refuse, before work, a place where no run can be written.

    Raises:
      UserError: says why.
    """
    if remote.is_object(place):
        places.checkpoints(place)
        remote.check_writable(remote.spelled(place), "--workdir")
    else:
        files.check_folder_target(place, "--workdir")


def at(place: str | os.PathLike) -> "Workdir":
    """The place of a run; nothing is written yet.

    Raises:
      UserError: an address where no run can lie.
    """
    if remote.is_object(place):
        return _Bucket(place)
    files.refuse_address(place, "--workdir")
    return Workdir(pathlib.Path(place))


class Workdir:
    """A run's folder on a file system.

    Attributes:
      path: the folder of all but checkpoints.
      place: how the user names it.
      checkpoints: the folder of checkpoints, as orbax takes it.
    """

    def __init__(self, path: pathlib.Path):
        """Writes nothing."""
        self.path, self.place = path, str(path)
        self.checkpoints: Any = path / "checkpoints"

    def same(self) -> str:
        """What must be equal in all processes."""
        return str(self.path.resolve())

    @contextlib.contextmanager
    def claimed(self, num_bytes: int) -> Iterator[None]:
        """Keeps others from training there for the block; a checkpoint has `num_bytes`.

        Raises:
          UserError: it cannot be written, another training is at work there, or a checkpoint has
            no room.
        """
        files.check_folder_target(self.path, "--workdir")
        files.check_folder_target(self.checkpoints, "the run's folder of checkpoints")
        self.path.mkdir(parents=True, exist_ok=True)
        with files.locked(self.path, f"another `soup-jax train` is at work in {self.path}"):
            files.check_room(self.path, num_bytes, f"a checkpoint of the run {self.path}")
            yield

    def refresh(self) -> None:
        """See what other processes have written."""

    def publish(self) -> None:
        """Let others see what this process has written.

        Raises:
          UserError: another start has taken the run over, or the bucket cannot be written.
        """

    def close(self) -> None:
        """Remove what lies here for the time of the command alone."""


class _Bucket(Workdir):
    def __init__(self, place: str | os.PathLike):
        self._published: dict[str, tuple[int, int]] = {}
        self._claim: dict[str, Any] | None = None
        with contextlib.ExitStack() as stack:
            super().__init__(stack.enter_context(files.temporary_folder("run")))
            self.place = remote.spelled(place).rstrip("/")
            self.checkpoints = places.checkpoints(place)
            self.refresh()
            self._open = stack.pop_all()

    def close(self) -> None:
        self._open.close()

    def same(self) -> str:
        return self.place

    @contextlib.contextmanager
    def claimed(self, num_bytes: int) -> Iterator[None]:
        # A lock would outlive a machine that is lost. So the last start has the run, and one before
        # it, should it live, finds that at its next save and leaves.
        del num_bytes
        remote.check_writable(self.place, "--workdir")
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        who = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
        self._claim = {"id": secrets.token_hex(16), **who}
        with files.temporary_folder("claim") as folder:
            files.write_json(folder / _CLAIM, self._claim)
            remote.put(folder / _CLAIM, f"{self.place}/{_CLAIM}")
        try:
            yield
        finally:
            # What came after the last save is for people; what ended the run is to be told first.
            try:
                self.publish()
                remote.remove(f"{self.place}/{_CLAIM}")
            except UserError as e:
                _log.warning("the last of the run's small files are not there: %s", e)
            self._claim = None

    def _check_claim(self) -> None:
        address, who = f"{self.place}/{_CLAIM}", "ended"
        if remote.stat(address):
            try:
                other = inputs.read_json(address, _CLAIM_HOLDS)
            except UnavailableError:
                raise
            except UserError as e:
                # Whoever wrote that may be at work there, too; ending costs the steps since a save.
                raise UserError(
                    f"this run ends, and saves nothing more, for somebody has written over the "
                    f"object by which it has {self.place}: {e}. The same command goes on from its "
                    "last save"
                ) from e
            if other == self._claim:
                return
            who = "process {pid} on {host}, since {since}".format_map(other)
        raise UserError(
            f"another `soup-jax train` has taken over {self.place} ({who}): this one ends, and "
            "saves nothing more"
        )

    def refresh(self) -> None:
        for name, found in places.small_files(self.place).items():
            files.fetch(found.address, self.path / name)
            self._published[name] = _stamp(self.path / name)

    def publish(self) -> None:
        try:
            self._publish()
        except UnavailableError as e:
            raise UnavailableError(f"{e}. The same command goes on from the last save") from e

    def _publish(self) -> None:
        if self._claim is not None:
            self._check_claim()
        with files.temporary_folder("copy") as folder:
            for path in files.files_in(self.path):
                name, stamp = path.relative_to(self.path).as_posix(), _stamp(path)
                if self._published.get(name) == stamp:
                    continue
                shutil.copyfile(path, folder / "file")  # trackers write on meanwhile
                remote.put(folder / "file", f"{self.place}/{name}")
                self._published[name] = stamp


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
