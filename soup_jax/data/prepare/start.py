"""How `prepare` begins: a new corpus, unfinished work to go on with, or one that is finished."""

import os
import pathlib
import shutil
import socket
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

_WORK = 3  # the form of what lies in .work


def write_request(
    folder: pathlib.Path, request: dict[str, Any], *, name: str = "request.json"
) -> None:
    """Write what describes unfinished work into its folder."""
    files.write_json(folder / name, request | {"work": _WORK})


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
    old = inputs.read_json(record, request_lib.REQUEST) if record.exists() else None
    known = old["sources"] if old else ()
    hashed = old is not None and all("sha256" in source for source in known)
    request = request_lib.make_request(cfg, sources, known=known, hashed=hashed, progress=_hashing)
    if old is None and not part.whole:
        old = _first_request(record, request)
    if old:
        differences = request_lib.differences(old, request)
        if old["format"] != request["format"] or old.get("work") != _WORK:
            differences.append("another version of soup_jax began it")
        told = "; ".join(differences)
        if differences and not part.whole:
            raise UserError(
                f"{record.parent} is unfinished work for other settings ({told}): give those of "
                "the other parts, or delete it"
            )
        if differences:
            say(f"unfinished work is dropped, it was for other settings: {told}")
            record.unlink()  # first, so that half-deleted work is never continued
        else:
            say("continuing the unfinished work of an earlier start")
    if not record.exists():
        shutil.rmtree(record.parent, ignore_errors=True)
        write_request(record.parent, request)
    splits = ["train", "validation"]
    if cfg.corpus.held_out_fraction > 0:
        splits.append("held_out")
    # joblib's count respects what a container or a batch system has granted.
    num_workers = cfg.corpus.num_workers or joblib.cpu_count()
    return Work(cfg, directory, sources, request, tuple(splits), num_workers, part, map)


def _first_request(record: pathlib.Path, request: dict[str, Any]) -> dict[str, Any]:
    """The request of the part that was the first to write it, which may be this one."""
    record.parent.mkdir(exist_ok=True)
    left = [p for p in record.parent.iterdir() if not p.name.startswith(".")]
    if left and not record.exists():
        raise UserError(
            f"{record.parent} has no request.json: what is there was not finished. Delete it"
        )
    own = record.with_name(f".request.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}")
    write_request(record.parent, request, name=own.name)
    try:
        os.link(own, record)  # fails if another one is there
    except FileExistsError:
        pass
    except OSError:  # a file system without links; all parts would write the same
        os.replace(own, record)
    own.unlink(missing_ok=True)
    return inputs.read_json(record, request_lib.REQUEST)
