"""From a few documents to domain weights (Algorithm 3 of the paper), and how far to trust them.

Embed each document, find its nearest centroid, and count it with as many tokens as it has: the
shares are h. So h means here what it means in training, where `mix(h)` draws windows of equal
length. Documents are treated as `prepare` treats those of the corpus: one longer than
`corpus.max_chars` is cut into pieces, each with a domain of its own, and its tokens include the
end-of-text token. The histogram of all training documents of a corpus is therefore
`Corpus.domain_frequencies`, up to the padding of its windows and the documents of which the
embedder can say nothing: half the sum of the differences is at most the two's share of the tokens.

A document that lies far from all centroids has a nearest one all the same;
`DocumentHistogram.warnings` says so. One of which the embedder can say nothing says nothing of h:
it counts as the corpus does on average.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.sparse

from soup_jax.data.domain_map import DomainMap
from soup_jax.data.sources import cut
from soup_jax.errors import UserError

_BAND = (0.05, 0.95)


@dataclasses.dataclass(frozen=True)
class DocumentHistogram:
    """Where documents lie among the domains of a corpus.

    Attributes:
      h_K: share of the documents' tokens that is nearest to each domain, float64, sums to 1.
        Domains without training windows cannot be drawn and get none.
      num_documents: how many were counted.
      outside: share of the tokens in documents less similar to their centroid than 99% of the
        corpus's own validation documents, those without a known word among them.
      num_unknown: documents without a word that the embedder knows; they count as
        `Corpus.domain_frequencies`.
      unknown: share of the tokens in documents, or pieces of long ones, without a known word.
      largest: share of the tokens in the longest document.
      low_K, high_K: bounds of the middle nine tenths of the h of other documents of the kind, by
        resampling these; None if that was not asked for.
    """

    h_K: np.ndarray
    num_documents: int
    outside: float
    num_unknown: int = 0
    unknown: float = 0.0
    largest: float = 0.0
    low_K: np.ndarray | None = None
    high_K: np.ndarray | None = None

    def nearest(self, corpus: DomainMap, *, num: int = 5) -> list[tuple[str, float]]:
        """(label, weight) of the heaviest domains, heaviest first."""
        order = np.argsort(-self.h_K, kind="stable")[:num]
        return [(corpus.label(int(k)), float(self.h_K[k])) for k in order if self.h_K[k] > 0]

    def warnings(self) -> list[str]:
        """Reasons to doubt h, in plain words; empty if there are none."""
        found = []
        if self.num_documents < 10:
            found.append(
                f"only {self.num_documents} documents: each moves the weights by "
                f"{100 / self.num_documents:.0f}% on average; give 20 or more"
            )
        if self.num_documents > 1 and self.largest > 0.5:
            found.append(
                f"one document has {self.largest:.0%} of the tokens, and as much of the weights: "
                "give more documents of its length, or a part of it"
            )
        if self.num_unknown:
            found.append(
                f"{self.num_unknown} of {self.num_documents} documents resemble no domain of the "
                "corpus: its embedder knows none of their words. They count as the corpus does on "
                "average"
            )
        if self.outside - self.unknown > 0.5:
            found.append(
                f"{self.outside:.0%} of the text resembles no domain of the corpus (documents "
                "less similar to the nearest centroid than 99% of the corpus's own): expect "
                "little from this specialist"
            )
        return found


def document_histogram(
    corpus: DomainMap, texts: Sequence[str], *, resamples: int = 0
) -> DocumentHistogram:
    """h of `texts` among the domains of `corpus`, with its tokenizer, embedder and centroids.

    Args:
      resamples: how often documents are drawn anew from these, with replacement, for bounds of h.

    Raises:
      UserError: no text.
    """
    if not texts:
        raise UserError("no documents to take domain weights from")
    # Pieces p of documents d.
    cuts = [cut(text, corpus.max_chars) for text in texts]
    document_p = np.repeat(np.arange(len(texts)), [len(pieces) for pieces in cuts])
    pieces = [piece for of_document in cuts for piece in of_document]
    embeddings = corpus.embedder().embed(pieces)
    nearest, levels = corpus.tree().assign(embeddings, corpus.domain_frequencies > 0)
    similarity = levels[:, -1]
    known = embeddings.any(axis=1)
    tokens_p = corpus.tokenizer().lengths(pieces) + 1  # with the end-of-text token
    total = tokens_p.sum()
    tokens_K = tokens_p[~known].sum() * corpus.domain_frequencies
    tokens_K += np.bincount(nearest[known], tokens_p[known], minlength=len(tokens_K))
    low = corpus.similarity_quantiles()[0.01]
    low_K = high_K = None
    if resamples:
        size = (len(texts), len(tokens_K))
        known_DK = scipy.sparse.csr_matrix(
            (tokens_p[known], (document_p[known], nearest[known])), shape=size
        )
        unknown_D = np.bincount(document_p[~known], tokens_p[~known], minlength=len(texts))
        times_RD = np.random.default_rng(0).multinomial(
            len(texts), np.full(len(texts), 1 / len(texts)), size=resamples
        )
        tokens_RK = times_RD @ known_DK
        tokens_RK = tokens_RK + (times_RD @ unknown_D)[:, None] * corpus.domain_frequencies
        h_RK = tokens_RK / tokens_RK.sum(axis=1, keepdims=True)
        low_K, high_K = np.quantile(h_RK, _BAND, axis=0)
    return DocumentHistogram(
        tokens_K / total,
        len(texts),
        outside=float(tokens_p[(similarity < low) | ~known].sum() / total),
        num_unknown=len(texts) - len(np.unique(document_p[known])),
        unknown=float(tokens_p[~known].sum() / total),
        largest=float(np.bincount(document_p, tokens_p).max() / total),
        low_K=low_K,
        high_K=high_K,
    )


def table(found: DocumentHistogram, corpus: DomainMap, *, most: int = 0) -> str:
    """The domains that have weight as aligned text, heaviest first, at most `most`; 0: all."""
    order = np.argsort(-found.h_K, kind="stable")
    order = order[found.h_K[order] > 0]
    lines = ["domain       h  nine in ten      corpus  label"]
    low_K, high_K = found.low_K, found.high_K
    for k in order[: most or None]:
        band = ""
        if low_K is not None and high_K is not None:
            band = f"{low_K[k]:.1%} - {high_K[k]:.1%}"
        lines.append(
            f"{k:>6}  {found.h_K[k]:>6.1%}  {band:<15}  {corpus.domain_frequencies[k]:>6.2%}  "
            f"{corpus.label(int(k))}"
        )
    if 0 < most < len(order):
        lines.append(f"   ...  {found.h_K[order[most:]].sum():>6.1%}  {len(order) - most} more")
    # The rule of three: of a kind of documents that are a share p of all, n show none with
    # probability (1 - p)^n.
    unseen = 1 - 0.05 ** (1 / found.num_documents)
    lines.append(
        f"{found.num_documents} documents, {found.outside:.1%} of their text outside of the corpus "
        "(1% of the corpus's own is); a domain that none of them lies in has, with 95% confidence, "
        f"less than {unseen:.1%} of documents of the kind"
    )
    return "\n".join(lines)
