"""Folders of specialists, soups and runs: on a file system, or in a bucket, through a copy here.

On a file system a folder appears whole or not at all. A bucket has no folders that could be put in
place at once: the file by which one is known (recipe.json, soup.json) goes first and comes last, so
that one that is not whole is refused, and the same command makes it whole.
"""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from soup_jax import inputs, remote
from soup_jax import storage as files
from soup_jax.errors import UserError

KNOWN_BY = ("recipe.json", "soup.json")
_RUN, _CHECKPOINTS = "domains/map.json", "checkpoints"


def check_replaceable(out: pathlib.Path, holds: str, otherwise: str) -> None:
    """Refuse, before work, a place whose content is not for us to replace by a folder.

    Args:
      holds: the file by which a folder that may be replaced is known.
      otherwise: what the place is without it, for the sentence.

    Raises:
      UserError: a folder with other content, or one that cannot be written.
    """
    if remote.is_object(out):
        address = remote.spelled(out).rstrip("/")
        remote.check_writable(address, "--out")
        names = {found.address.removeprefix(f"{address}/") for found in remote.find(address)}
        other = bool(names) and holds not in names and not (names & {_UPLOADING})
    else:
        files.check_folder_target(out, "--out")
        files.recover_folder(out)
        other = out.exists() and any(out.iterdir()) and not (out / holds).exists()
    if other:
        raise UserError(f"{remote.spelled(out)} exists and {otherwise}; choose another folder")


# There while a folder is copied to a bucket; tells that what lies there is ours.
_UPLOADING = ".soup_jax-uploading"


@contextlib.contextmanager
def written(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder to fill, which takes the place of `out` at the end of the block."""
    if not remote.is_object(out):
        with files.atomic_folder(out) as folder:
            yield folder
        return
    with files.temporary_folder("folder") as folder:
        yield folder
        _put(folder, remote.spelled(out).rstrip("/"))


def _put(folder: pathlib.Path, address: str) -> None:
    mark = folder.parent / f"{folder.name}.mark"
    mark.write_bytes(b"soup_jax")
    try:
        remote.put(mark, f"{address}/{_UPLOADING}")
    finally:
        mark.unlink()
    old = {found.address for found in remote.find(address)}
    for name in KNOWN_BY:
        if f"{address}/{name}" in old:
            remote.remove(f"{address}/{name}")
    names = [path.relative_to(folder).as_posix() for path in files.files_in(folder)]
    for name in sorted(names, key=lambda name: (name in KNOWN_BY, name)):
        remote.put(folder / name, f"{address}/{name}")
    for stale in old - {f"{address}/{name}" for name in names}:
        remote.remove(stale)


def checkpoints(run: str | os.PathLike) -> Any:
    """The folder of a run's checkpoints, as orbax takes it: in a bucket it reads and writes them
    at their address.

    Raises:
      UserError: an address that orbax does not write.
    """
    if not remote.is_object(run):
        return pathlib.Path(run) / _CHECKPOINTS
    place = remote.spelled(run).rstrip("/")
    if remote.scheme(run) != "gs":
        raise UserError(
            f"{place}: orbax writes no checkpoints to {remote.scheme(run)}://. Train at gs:// or "
            "on a file system (a mounted bucket is one); `soup-jax pack --out=ADDRESS` puts the "
            "soup there"
        )
    remote.check_installed(place)
    import fsspec

    # Its listings are remembered, and tensorstore writes past it, as other processes do.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    return epath.Path(place) / _CHECKPOINTS


def move(folder: epath.Path, target: epath.Path) -> None:
    """Give a folder another name; nothing may have that name."""
    if remote.is_object(folder):
        remote.move(folder, target)
    else:
        folder.rename(target)


def small_files(run: str | os.PathLike) -> dict[str, remote.Found]:
    """What lies in a run at an address but for checkpoints and hidden files, by relative name."""
    address = remote.spelled(run).rstrip("/")
    found = {f.address.removeprefix(f"{address}/"): f for f in remote.find(address)}
    return {n: f for n, f in found.items() if not n.startswith((f"{_CHECKPOINTS}/", "."))}


def given_back(path: pathlib.Path, place: str | os.PathLike) -> str:
    """The place of a file that was written to `local(place)`: in a bucket, it is copied there."""
    if not remote.is_object(place):
        return str(path)
    address = f"{remote.spelled(place).rstrip('/')}/{path.name}"
    remote.put(path, address)
    return address


def _folder_files(address: str, *, models: bool) -> dict[str, remote.Found]:
    found = small_files(address)
    if {*KNOWN_BY, _RUN} & found.keys():
        return found
    if models and "config.json" in found:
        # Beside them may lie the same weights in other formats, and whole folders of them.
        kinds = (".json", ".safetensors")
        return {n: f for n, f in found.items() if n.endswith(kinds) and "/" not in n}
    model = ", nor a model of transformers, which has a config.json" if models else ""
    raise UserError(
        f"{address} holds neither {' nor '.join(KNOWN_BY)}: it is no specialist and no soup "
        f"folder, or not all of it was copied there; nor a run, which has a {_RUN}{model}"
    )


def local(place: str | os.PathLike, *, models: bool = False) -> pathlib.Path:
    """The folder itself; of one at an address, the copy here, of a run without its checkpoints.

    Copies lie in `storage.copies("folders")`; only what has changed is copied again.

    Args:
      models: at the address may lie a model of transformers; its safetensors and JSON are copied.

    Raises:
      UserError: another address, or nothing of the kind is there.
    """
    if not remote.is_object(place):
        files.refuse_address(place, objects=True)
        return pathlib.Path(place)
    address = remote.spelled(place).rstrip("/")
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    parent = files.copies("folders")
    folder = parent / f"{address.rpartition('/')[2]}-{digest}"
    found = _folder_files(address, models=models)
    parent.mkdir(parents=True, exist_ok=True)
    record = parent / f"{folder.name}.json"
    with files.waiting(parent / f"{folder.name}.lock"):
        known = inputs.read_json(record) if record.exists() else {}
        files.check_room(parent, sum(f.size for f in found.values()), f"a copy of {address}")
        for name, f in found.items():
            path = folder / name
            if known.get(name) != f.tag or not path.is_file() or path.stat().st_size != f.size:
                path.parent.mkdir(parents=True, exist_ok=True)
                files.fetch(f.address, path)
        for path in files.files_in(folder):
            if path.relative_to(folder).as_posix() not in found:
                path.unlink()
        files.write_json(record, {name: f.tag for name, f in found.items()})
    return folder
