"""What the stages of `prepare` share: the folder they work in, workers, words to the user."""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import safetensors
import tqdm

from soup_jax import inputs
from soup_jax import storage as files
from soup_jax.data import sources as corpus_lib
from soup_jax.data.embed import parallel


@dataclasses.dataclass(frozen=True)
class Part:
    """Which of the work a process does, where several share it and a disk.

    Attributes:
      index, number: of each stage, the jobs whose number leaves `index` divided by `number`; none
        if `number` is 0.
      merges: whether it does what one process must do alone.
    """

    index: int = 0
    number: int = 1
    merges: bool = True

    @property
    def whole(self) -> bool:
        """Whether it does everything."""
        return self.number == 1 and self.merges

    def owns(self, job: int) -> bool:
        """Whether job number `job` of a stage is its."""
        return self.number > 0 and job % self.number == self.index


@dataclasses.dataclass(frozen=True)
class Job:
    """A call whose result is one of these files; if one is there, it is done.

    `number` is what parts share the jobs by; None: its place among them.
    """

    arguments: tuple[Any, ...]
    outputs: tuple[pathlib.Path, ...]
    number: int | None = None


class Waiting(Exception):
    """A part cannot go on; the message says what others have yet to do."""


Map = Callable[..., Iterable[Any]]  # as `parallel.parallel_map`


@dataclasses.dataclass(frozen=True)
class Work:
    """What every stage needs to know."""

    cfg: Any
    directory: pathlib.Path
    sources: Sequence[corpus_lib.SourceFile]
    request: dict[str, Any]
    splits: tuple[str, ...]
    num_workers: int
    part: Part = Part()
    map: Map | None = None

    @property
    def path(self) -> pathlib.Path:
        """Intermediate outputs; removed at the end."""
        return self.directory / ".work"

    @property
    def final(self) -> pathlib.Path:
        """Finished artefacts, moved to `directory` at the end."""
        return self.path / "final"

    @property
    def kept(self) -> pathlib.Path:
        """Which documents the corpus is made of, once that was decided (`clean`)."""
        return self.path / "kept.safetensors"

    @property
    def documents(self) -> list[pathlib.Path]:
        """The shards of the documents that the corpus is made of."""
        return self.shards("clean")

    def shards(self, kind: str) -> list[pathlib.Path]:
        """The paths of one kind of output for every document shard, in order."""
        if self.kept.exists():  # those that were read are being moved
            with safetensors.safe_open(self.kept, "numpy") as file:
                names = json.loads(file.metadata()["state"])["names"]
        else:
            names = sorted(path.name for path in (self.path / "documents").glob("*.safetensors"))
        return [self.path / kind / name for name in names]


def run_jobs(
    work: Work, function: Callable[..., None], jobs: Sequence[Job], name: str, *, wait: bool = True
) -> str:
    """`function(*job.arguments)` for every job that is not done, under a progress bar.

    Returns:
      What other parts have still to do; empty if they have done their jobs.

    Raises:
      Waiting: with that as its message, unless `wait` is False.
    """
    missing = [
        (i if job.number is None else job.number, (function, job.outputs, job.arguments))
        for i, job in enumerate(jobs)
        if not any(path.exists() for path in job.outputs)
    ]
    own = [call for number, call in missing if work.part.owns(number)]
    if own:
        done = (work.map or parallel.parallel_map)(_once, own, num_workers=work.num_workers)
        for _ in progress(done, name, total=len(own)):
            pass
    others = len(missing) - len(own)
    left = f"{name}: {others} of {len(jobs)} outputs are still to be made by shards" * bool(others)
    if left and wait:
        raise Waiting(left)
    return left


def _once(
    function: Callable[..., None], outputs: Sequence[pathlib.Path], arguments: tuple[Any, ...]
) -> None:
    # A runner may give a job to two workers, or again after it was done.
    if any(path.exists() for path in outputs):
        return
    try:
        function(*arguments)
    except FileNotFoundError:  # the other one has taken what this one was to read
        if not any(path.exists() for path in outputs):
            raise


@contextlib.contextmanager
def timed(work: Work, stage: str) -> Iterator[None]:
    """Note how long the block takes, for `write_timings`."""
    begin = time.monotonic()
    try:
        yield
    finally:
        line = {"stage": stage, "seconds": round(time.monotonic() - begin, 3)}
        path = work.path / "timings.jsonl"  # not there any more if another part has finished
        with contextlib.suppress(FileNotFoundError), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def write_timings(work: Work) -> str:
    """Write timings.json, which the manifest does not name: the seconds of each stage, of all
    starts and parts together, and the bytes of text; returns a line about them."""
    seconds: dict[str, float] = {}
    for line in (work.path / "timings.jsonl").read_text("utf-8").splitlines():
        with contextlib.suppress(ValueError):  # half a line, of a part that was killed
            entry = json.loads(line)
            seconds[entry["stage"]] = round(seconds.get(entry["stage"], 0) + entry["seconds"], 3)
    splits = inputs.read_json(work.final / "manifest.json")["counts"]["splits"]
    size, total = sum(split["bytes"] for split in splits.values()), sum(seconds.values())
    files.write_json(
        work.final / "timings.json",
        {"seconds": seconds, "text_bytes": size, "num_workers": work.num_workers},
    )
    longest = max(seconds, key=seconds.__getitem__)
    return (
        f"{size / 1e6:,.0f} MB of text at {size / 1e6 / max(total, 1e-3):.2f} MB/s; "
        f"{seconds[longest] / max(total, 1e-3):.0%} of the time went into {longest}"
    )


def alone(work: Work, name: str) -> None:
    """Goes before what one process must do alone.

    Raises:
      Waiting: this part does not.
    """
    if not work.part.merges:
        raise Waiting(f"{name} is for `--merge`, when all shards have done as much as this one")


def progress(items: Iterable[Any], name: str, total: int | None = None) -> Iterator[Any]:
    """Pass `items` on under a progress bar; one line on stderr when that is not a terminal."""
    if not sys.stderr.isatty():
        say(name)
    yield from tqdm.tqdm(
        items, desc=name, total=total, mininterval=0.5, disable=not sys.stderr.isatty()
    )


def say(text: str) -> None:
    """A line on stderr."""
    print(f"prepare: {text}", file=sys.stderr, flush=True)
