"""A specialist from a file of documents: embed, histogram, route, merge, save. No training."""

import logging
import pathlib

from soup_jax.evaluation.sets import read_texts
from soup_jax.specialists import export
from soup_jax.specialists.open import load
from soup_jax.specialists.specialist import Specialist

_log = logging.getLogger(__name__)


def instantiate_to(
    run: str | pathlib.Path,
    documents: str,
    out: str | pathlib.Path,
    *,
    step: int | None = None,
    corpus_dir: str = "",
) -> tuple[Specialist, list[tuple[str, float]]]:
    """`soup-jax instantiate`: from a run and a file of documents to a specialist's folder.

    Returns:
      The specialist, and (label, weight) of the domains its documents resemble most.

    Raises:
      UserError: a run or documents that cannot be read, or a folder with something else in it.
    """
    export.check_target(pathlib.Path(out))
    soup = load(run, step=step, corpus_dir=corpus_dir)
    texts, damage = read_texts(documents, text_field=soup.cfg.corpus.text_field)
    for line in damage:
        _log.warning("%s", line)
    specialist = soup.instantiate([d.text for d in texts])
    specialist.save(out)
    histogram = specialist.histogram
    return specialist, histogram.nearest(soup.corpus) if histogram else []
