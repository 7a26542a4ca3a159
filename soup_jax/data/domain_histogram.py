"""From a few documents to domain weights (Algorithm 3 of the paper), and how far to trust them.

Embed each document, count nearest centroids: the histogram is h. A document that lies far from all
centroids has a nearest one all the same; `DocumentHistogram.warnings` says so. One of which the
embedder can say nothing says nothing of h: it counts as the corpus does on average.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from soup_jax.data import domains
from soup_jax.data.corpus import Corpus
from soup_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DocumentHistogram:
    """Where documents lie among the domains of a corpus.

    Attributes:
      h_K: share of the documents nearest to each domain, float64, sums to 1. Domains without
        training windows cannot be drawn and get none.
      num_documents: how many were counted.
      outside: share of the documents less similar to their centroid than 99% of the corpus's own,
        those without a known word among them.
      num_unknown: documents without a word that the embedder knows; they count as
        `Corpus.domain_frequencies`.
    """

    h_K: np.ndarray
    num_documents: int
    outside: float
    num_unknown: int = 0

    def nearest(self, corpus: Corpus, *, num: int = 5) -> list[tuple[str, float]]:
        """(label, weight) of the heaviest domains, heaviest first."""
        order = np.argsort(-self.h_K, kind="stable")[:num]
        return [(corpus.label(int(k)), float(self.h_K[k])) for k in order if self.h_K[k] > 0]

    def warnings(self) -> list[str]:
        """Reasons to doubt h, in plain words; empty if there are none."""
        found = []
        if self.num_documents < 10:
            found.append(
                f"only {self.num_documents} documents: each moves the weights by "
                f"{100 / self.num_documents:.0f}%; give 20 or more"
            )
        if self.num_unknown:
            found.append(
                f"{self.num_unknown} of {self.num_documents} documents resemble no domain of the "
                "corpus: its embedder knows none of their words. They count as the corpus does on "
                "average"
            )
        if self.outside - self.num_unknown / self.num_documents > 0.5:
            found.append(
                f"{self.outside:.0%} of the documents resemble no domain of the corpus (less "
                "similar to the nearest centroid than 99% of the training documents): expect "
                "little from this specialist"
            )
        return found


def document_histogram(corpus: Corpus, texts: Sequence[str]) -> DocumentHistogram:
    """h of `texts` among the domains of `corpus`, with its embedder and centroids.

    Raises:
      UserError: no text.
    """
    if not texts:
        raise UserError("no documents to take domain weights from")
    embeddings = corpus.embedder().embed(texts)
    centroids = corpus.centroids()
    available = np.flatnonzero(np.diff(corpus.offsets["train"]))
    nearest, similarity = domains.assign(embeddings, centroids[available])
    known = embeddings.any(axis=1)
    num_unknown = int(np.count_nonzero(~known))
    h_K = num_unknown * corpus.domain_frequencies / len(texts)
    h_K[available] += np.bincount(nearest[known], minlength=len(available)) / len(texts)
    low = corpus.similarity_quantiles()[0.01]
    outside = float(np.mean((similarity < low) | ~known))
    return DocumentHistogram(h_K, len(texts), outside, num_unknown)
