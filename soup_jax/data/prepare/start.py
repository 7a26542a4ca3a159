"""How `prepare` begins: a new corpus, unfinished work to go on with, or one that is finished."""

import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Sequence
from typing import Any

import joblib

from soup_jax import inputs
from soup_jax import storage as files
from soup_jax.data import sources as corpus_lib
from soup_jax.data.corpus import Corpus
from soup_jax.data.prepare import provenance as request_lib
from soup_jax.data.prepare.work import Map, Part, Work, progress, say
from soup_jax.errors import UserError

_WORK = 2  # the form of what lies in .work
_PATIENCE = 60.0  # seconds that a part waits for the first one to describe the work


def write_request(folder: pathlib.Path, request: dict[str, Any]) -> None:
    """Write request.json of unfinished work in a folder."""
    files.write_json(folder / "request.json", request | {"work": _WORK})


def least_bytes(sources: Sequence[corpus_lib.SourceFile]) -> int:
    """Of disk that a corpus of these sources needs until it is done."""
    # The text once and its tokens twice: at least twice the bytes that lie in the sources, for
    # what is compressed there is not compressed here.
    return 2 * sum(source.size for source in sources)


def _hashing(sources: Sequence[Any]) -> Iterable[Any]:
    return progress(sources, "hashing the sources", total=len(sources))


def finished(cfg: Any, corpus: Corpus, sources: Sequence[corpus_lib.SourceFile]) -> Corpus:
    """The corpus that lies there, if it is what is asked for.

    Raises:
      UserError: it was made from other settings or sources.
    """
    old = corpus.manifest["request"]
    request = request_lib.make_request(cfg, sources, known=old["sources"], progress=_hashing)
    differences = request_lib.differences(old, request)
    place = corpus.cache.address if corpus.cache else corpus.path
    if differences:
        raise UserError(
            f"{place} was prepared from other settings or sources ({'; '.join(differences)}). "
            "Choose another --config.corpus.dir, or delete the folder to prepare it anew"
        )
    shutil.rmtree(corpus.path / ".work", ignore_errors=True)  # killed between manifest and tidying
    say(
        f"{place} is already prepared (sources whose size and time of change are as they were "
        "then were not read again)"
    )
    return corpus


def start(
    cfg: Any,
    directory: pathlib.Path,
    sources: Sequence[corpus_lib.SourceFile],
    part: Part,
    map: Map | None,
) -> Work:
    """The work in a folder that is locked: what an earlier start has left of it, or new.

    Raises:
      UserError: something else lies there, or, of a part, work for other settings.
    """
    present = os.listdir(directory)
    if present and ".work" not in present:
        raise UserError(
            f"{directory} is neither empty nor a prepared corpus (it holds {present[0]!r}): choose "
            "another --config.corpus.dir"
        )
    record = directory / ".work" / "request.json"
    if not part.merges and not record.exists():
        _first_of_parts(record)
    old = inputs.read_json(record, request_lib.REQUEST) if record.exists() else None
    known = old["sources"] if old else ()
    hashed = old is not None and all("sha256" in source for source in known)
    request = request_lib.make_request(cfg, sources, known=known, hashed=hashed, progress=_hashing)
    if old:
        differences = request_lib.differences(old, request)
        if old["format"] != request["format"] or old.get("work") != _WORK:
            differences.append("another version of soup_jax began it")
        told = "; ".join(differences)
        if differences and not part.merges:
            raise UserError(
                f"{record.parent} is unfinished work for other settings ({told}): `soup-jax "
                "prepare --merge` with these drops it"
            )
        if differences:
            say(f"unfinished work is dropped, it was for other settings: {told}")
            record.unlink()  # first, so that half-deleted work is never continued
        else:
            say("continuing the unfinished work of an earlier start")
    if not record.exists():
        if part.merges:
            shutil.rmtree(record.parent, ignore_errors=True)
        write_request(record.parent, request)
    splits = ["train", "validation"]
    if cfg.corpus.held_out_fraction > 0:
        splits.append("held_out")
    # joblib's count respects what a container or a batch system has granted.
    num_workers = cfg.corpus.num_workers or joblib.cpu_count()
    return Work(cfg, directory, sources, request, tuple(splits), num_workers, part, map)


def _first_of_parts(record: pathlib.Path) -> None:
    """Wait for the part that has made the folder to describe the work; this one may be it."""
    try:
        record.parent.mkdir()
        return
    except FileExistsError:
        pass
    deadline = time.monotonic() + _PATIENCE
    while not record.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{record.parent} has no request.json: what is there was not finished. `soup-jax "
                "prepare --merge` drops it"
            )
        time.sleep(0.1)
