"""A prepared corpus in object storage: what a process reads of it is copied to a folder here, once.

ArrayRecord reads small pieces at random places, for which a bucket is slow. So a window file is
copied as a whole when its first window is asked for, compared with the SHA-256 of the manifest, and
read from then on. Processes of a machine share the folder.
"""

import dataclasses
import hashlib
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any

from soup_jax import inputs, remote
from soup_jax import storage as files
from soup_jax.errors import UserError

_log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_LARGE = 16 << 20  # bytes; copying more is told


def folder_of(address: str, cache_dir: str = "") -> pathlib.Path:
    """The local folder for the corpus at an address; `cache_dir` empty: in `storage.copies`.

    Raises:
      UserError: `cache_dir` is an address itself.
    """
    files.refuse_address(cache_dir, "corpus.cache_dir")
    parent = pathlib.Path(cache_dir or files.copies("corpora"))
    place = remote.spelled(address).rstrip("/")
    name = place.rpartition("/")[2]
    return parent / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"


@dataclasses.dataclass(frozen=True)
class CorpusCache:
    """An address, and the folder of the copies."""

    address: str
    folder: pathlib.Path

    def manifest(self) -> bool:
        """Copy the manifest, if it is there; copies of files of another one are dropped."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        known = self.folder / "origin.json"
        with files.waiting(self.folder.with_name(f"{self.folder.name}.lock")):
            found = remote.stat(f"{self.address}/{_MANIFEST}")
            if found is None:
                return False
            self.folder.mkdir(exist_ok=True)
            origin = {"address": remote.spelled(self.address), "tag": found.tag}
            if known.exists() and inputs.read_json(known) == origin:
                return True
            new = self.folder / f"{_MANIFEST}.new"
            files.fetch(found.address, new)
            old = self.folder / _MANIFEST
            if old.exists() and inputs.sha256_file(old) != inputs.sha256_file(new):
                _log.info("%s is another corpus than before: its copy is dropped", self.address)
                for path in self.folder.iterdir():
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path != new:
                        path.unlink()
            os.replace(new, old)
            files.write_json(known, origin)
            return True

    def forget(self) -> None:
        """Drop the copies of a corpus that is no longer at the address, before another is made; one
        that was made here and is yet to be copied there stays."""
        if (self.folder / "origin.json").exists():
            shutil.rmtree(self.folder)

    def file(self, name: str, artefact: Mapping[str, Any]) -> pathlib.Path:
        """The local copy of a file of the corpus.

        Args:
          artefact: its `bytes` and `sha256`, of the manifest.

        Raises:
          UserError: it cannot be copied, or is not what the manifest says.
        """
        path = self.folder / name
        if _has(path, artefact["bytes"]):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.waiting(path.with_name(f".{path.name}.lock")):
            if _has(path, artefact["bytes"]):
                return path
            begin = time.monotonic()
            files.check_room(self.folder, artefact["bytes"], f"the copy of {name}")
            new = path.with_name(f".{path.name}.new")
            files.fetch(f"{self.address}/{name}", new)
            if inputs.sha256_file(new) != artefact["sha256"]:
                new.unlink()
                raise UserError(
                    f"the corpus is damaged: {remote.spelled(self.address)}/{name} is not what its "
                    "manifest says. Restore it, or delete the corpus and prepare it again"
                )
            os.replace(new, path)
            if artefact["bytes"] >= _LARGE:
                took = time.monotonic() - begin
                _log.info("copied %s, %.0f MB, in %.1f s", name, artefact["bytes"] / 1e6, took)
        return path


def upload(folder: pathlib.Path, address: str, artefacts: Mapping[str, Mapping[str, Any]]) -> None:
    """Copy the files of a corpus to an address, the manifest last.

    What an upload that was killed has copied is known by a journal, and not copied again.

    Args:
      artefacts: of the manifest, `artefacts_of`.

    Raises:
      UserError: one cannot be written.
    """
    record = folder / "uploaded.json"
    done = inputs.read_json(record) if record.exists() else {}
    for name, artefact in artefacts.items():
        there = remote.stat(f"{address}/{name}")
        if there and done.get(name) == [artefact["sha256"], there.tag]:
            continue
        written = remote.put(folder / name, f"{address}/{name}")
        done[name] = [artefact["sha256"], written.tag]
        files.write_json(record, done)
    written = remote.put(folder / _MANIFEST, f"{address}/{_MANIFEST}")
    origin = {"address": remote.spelled(address), "tag": written.tag}
    files.write_json(folder / "origin.json", origin)


def _has(path: pathlib.Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
