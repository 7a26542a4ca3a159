"""A specialist from files of documents: embed, histogram, route, search, merge, save."""

import logging
import pathlib
from collections.abc import Callable, Sequence

from soup_jax import storage as files
from soup_jax.errors import UserError
from soup_jax.evaluation.sample import read_sample
from soup_jax.specialists import export
from soup_jax.specialists.open import load
from soup_jax.specialists.specialist import Specialist
from soup_jax.specialists.trained import Soup

_log = logging.getLogger(__name__)


def instantiate_to(
    run: str | pathlib.Path,
    documents: str | Sequence[str],
    out: str | pathlib.Path,
    *,
    method: str = "auto",
    step: int | None = None,
    average: int = 1,
    corpus_dir: str = "",
    say: Callable[[str], None] = _log.info,
) -> tuple[Specialist, list[tuple[str, float]]]:
    """`soup-jax instantiate`: from a run and files of documents to a specialist's folder.

    Args:
      documents: files, folders or globs; the documents of all are those of the one specialist.
      method: see `Soup.instantiate_each`.
      average: see `open.load`.
      say: takes lines on what was read: the checkpoint, and the documents.

    Returns:
      The specialist, and (label, weight) of the domains its documents resemble most.

    Raises:
      UserError: a run or documents that cannot be read, or a folder with something else in it.
    """
    export.check_target(pathlib.Path(out))
    sources = [documents] if isinstance(documents, str) else documents
    for source in sources:
        files.refuse_address(source, "--documents", objects=True)
    soup = load(run, step=step, average=average, corpus_dir=corpus_dir)
    texts = read_texts(soup, sources, method=method, say=say)
    specialist = soup.instantiate(texts, method=method)
    specialist.save(out)
    histogram = specialist.histogram
    return specialist, histogram.nearest(soup.map) if histogram else []


def read_texts(
    soup: Soup, sources: Sequence[str], *, method: str, say: Callable[[str], None]
) -> list[str]:
    """Files, folders or globs of documents for a soup, without exact duplicates.

    Args:
      method: of what is made of them; see `Soup.memory`.
      say: takes lines on the checkpoint and on what was read.

    Raises:
      UserError: no document could be read.
    """
    sample = read_sample(sources, text_field=soup.cfg.corpus.text_field)
    older = "" if soup.step == soup.newest else f" (its newest checkpoint is step {soup.newest})"
    say(f"from step {soup.step} of {soup.place}{older}")
    for line in sample.summary():
        say(line)
    say(soup.memory(1, [method]))
    try:
        trained_on = soup.corpus.trained_on([d.hash for d in sample.documents])
    except UserError:  # it is needed for nothing else here
        trained_on = None
    if trained_on is not None and trained_on.any():
        say(f"{trained_on.sum()} of {len(trained_on)} documents are in the run's training text")
    for line in [*sample.damage, *sample.warnings()]:
        _log.warning("%s", line)
    return [d.text for d in sample.documents]
