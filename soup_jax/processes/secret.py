"""The secret that the processes of a run share: whoever knows it may take part.

It comes from the variable SOUP_JAX_SECRET, which launchers set for all processes. Without it
process 0 makes one at each start and writes it to WORKDIR/.secret, which only the user can read and
all processes of the run see. It is removed once all are connected, or the start has failed. The
file of a start that was killed may still lie there: a process whose secret is refused reads the
file again until it changes.
"""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Mapping

from soup_jax import remote
from soup_jax.errors import UserError

VARIABLE = "SOUP_JAX_SECRET"
FILE_NAME = ".secret"
FROM_VARIABLE, FROM_FILE = "variable", "file"
_FEWEST = 16  # characters: shorter ones can be guessed from one recorded hello


class Secret:
    """Where this process has the secret from; it is none before the first `publish` or `read`.

    Attributes:
      source: FROM_VARIABLE or FROM_FILE.
    """

    def __init__(self, value: bytes | None, path: pathlib.Path | None = None):
        """Without a value, `path` is the file of the secret."""
        self.source = FROM_FILE if value is None else FROM_VARIABLE
        self.path, self._value = path, value
        self._made: list[pathlib.Path] = []  # folders that were not there, outermost first
        self._published = b""

    def publish(self) -> bytes:
        """In process 0: the secret, after it has been written to the file unless all know it.

        Raises:
          UserError: the workdir cannot be written.
        """
        if self._value is not None:
            return self._value
        assert self.path is not None
        value = secrets.token_hex(32).encode()
        folder = self.path.parent
        temporary = folder / f"{FILE_NAME}.{secrets.token_hex(4)}"
        try:
            missing = [p for p in (folder, *folder.parents) if not p.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._made = missing[::-1]
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
                f.write(value)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, self.path)
        except OSError as e:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self.remove()
            raise UserError(
                f"process 0 cannot write the secret of the run to {self.path}: {e}; choose another "
                f"--workdir, or set {VARIABLE} on all processes"
            ) from e
        self._value = self._published = value
        return value

    def read(self) -> bytes | None:
        """The secret as it is now; None if there is no file yet."""
        if self._value is not None:
            return self._value
        assert self.path is not None
        # NFS keeps for a while that a name does not exist; it asks the server when a folder is
        # opened.
        for folder in (self.path.parent.parent, self.path.parent):
            with contextlib.suppress(OSError):
                os.listdir(folder)
        try:
            return self.path.read_bytes()[:1024] or None
        except OSError:
            return None

    def remove(self, *, folders: bool = True) -> None:
        """Remove the file, and with `folders` those that were made for it, if they are empty."""
        if self.path is None:
            return
        with contextlib.suppress(OSError):
            # Not the file of a later start in the same workdir.
            if self._published and self.path.read_bytes() == self._published:
                self.path.unlink()
        if folders:
            with contextlib.suppress(OSError):
                for folder in reversed(self._made):
                    folder.rmdir()


def find_secret(workdir: pathlib.Path | None, env: Mapping[str, str] = os.environ) -> Secret:
    """The secret of the variable, or one that process 0 writes into the workdir.

    Raises:
      UserError: the variable is too short, or there is neither a variable nor a workdir.
    """
    value = env.get(VARIABLE, "").strip()
    if value:
        if len(value) < _FEWEST:
            raise UserError(
                f"{VARIABLE} has {len(value)} characters, at least {_FEWEST} are needed: make one "
                "with `python -c 'import secrets; print(secrets.token_hex(32))'`"
            )
        return Secret(value.encode("utf-8", "surrogateescape"))
    if workdir is not None and remote.is_object(workdir):
        raise UserError(
            f"many processes with a --workdir in a bucket need {VARIABLE} on all of them: "
            "`python -c 'import secrets; print(secrets.token_hex(32))'` makes one"
        )
    if workdir is None:
        raise UserError(f"many processes need {VARIABLE}, or a workdir to write a secret to")
    return Secret(None, workdir / FILE_NAME)
