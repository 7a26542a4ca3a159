"""What the stages of `prepare` share: the folder they work in, workers, words to the user."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tqdm

from soup_jax.data import sources as corpus_lib
from soup_jax.data.embed import parallel


@dataclasses.dataclass(frozen=True)
class Work:
    """What every stage needs to know."""

    cfg: Any
    directory: pathlib.Path
    sources: Sequence[corpus_lib.SourceFile]
    request: dict[str, Any]
    splits: tuple[str, ...]
    num_workers: int

    @property
    def path(self) -> pathlib.Path:
        """Intermediate outputs; removed at the end."""
        return self.directory / ".work"

    @property
    def final(self) -> pathlib.Path:
        """Finished artefacts, moved to `directory` at the end."""
        return self.path / "final"

    @property
    def cleans(self) -> bool:
        """Whether documents that were read are left out (`clean`)."""
        return bool(self.cfg.corpus.near_duplicates or self.cfg.corpus.evaluation)

    @property
    def documents(self) -> list[pathlib.Path]:
        """The shards of the documents that the corpus is made of."""
        return self.shards("clean" if self.cleans else "documents")

    def shards(self, kind: str) -> list[pathlib.Path]:
        """The paths of one kind of output for every document shard, in order."""
        names = sorted(path.name for path in (self.path / "documents").glob("*.safetensors"))
        return [self.path / kind / name for name in names]


def run_jobs(work: Work, function: Callable[..., None], jobs: Sequence[tuple], name: str) -> None:
    """`function(*job)` for every job in worker processes, under a progress bar."""
    if jobs:
        done = parallel.parallel_map(function, jobs, num_workers=work.num_workers)
        for _ in progress(done, name, total=len(jobs)):
            pass


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
