"""Domains: k-means centroids of document embeddings, nearest centroid, histogram, labels.

1. `fit_centroids` unit embeddings [n, dim]     -> centroids [K, dim], unit rows
2. `assign`        embeddings, centroids        -> nearest domain and cosine similarity per row
3. `histogram`     nearest domains [n]          -> h [K], the domain weights of these documents
4. `top_terms`     texts, their domains         -> words that tell a domain from the others

A document without a direction (a row of zeros) has similarity 0 and falls to domain 0, as every
document of a corpus must lie somewhere; `domain_histogram` counts it for none. This module knows
neither files nor tokens.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import threadpoolctl

from soup_jax.data.embed.base import unit_rows
from soup_jax.data.embed.tfidf_svd import weigh
from soup_jax.errors import UserError

# Above this many domains k-means is done in two levels.
FLAT_DOMAINS = 1024
QUANTILES = (0.01, 0.05, 0.5)
LABEL_CHARS = 2_000  # of a document; its beginning says what it is about
_LABEL_FEATURES = 20_000
_ROWS = 4096


def fit_centroids(embeddings: np.ndarray, num_domains: int) -> np.ndarray:
    """Unit centroids float32 [K, dim] by k-means on unit embeddings [n, dim]; deterministic.

    Every centroid is the nearest one of at least one row. Above FLAT_DOMAINS two levels are used:
    about sqrt(K) clusters, each cut into a share of the K in proportion to its rows. Flat k-means
    costs n * K * dim per iteration and, with thousands of seeds, leaves many in a few dense spots;
    two levels cost about n * sqrt(K) * dim and spread them.

    Raises:
      UserError: fewer rows, or fewer different rows, than domains.
    """
    rows = embeddings[np.linalg.norm(embeddings, axis=1) > 0]
    if len(rows) < num_domains:
        raise UserError(
            f"num_domains is {num_domains}, but only {len(rows)} train documents with known words "
            "were found: lower --config.num_domains or add sources"
        )
    # Sums of threads are not reproducible, and a limit holds for what is loaded when it is set:
    # imported below it, scikit-learn would bring an OpenMP of as many threads as there are cores.
    import sklearn.cluster  # noqa: F401

    with threadpoolctl.threadpool_limits(1):
        if num_domains <= FLAT_DOMAINS:
            centroids = _kmeans(rows, num_domains)
        else:
            centroids = _two_levels(rows, num_domains)
        return _fill_empty(rows, unit_rows(centroids))


def assign(embeddings: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(nearest int32 [n], similarity float32 [n]) of embeddings [n, dim] to centroids [K, dim].

    Similarity is the cosine; among equals the lowest domain wins.
    """
    nearest = np.zeros(len(embeddings), np.int32)
    similarity = np.zeros(len(embeddings), np.float32)
    for start in range(0, len(embeddings), _ROWS):
        part = slice(start, start + _ROWS)
        cosine = embeddings[part] @ centroids.T
        nearest[part] = cosine.argmax(axis=1)
        similarity[part] = cosine[np.arange(len(cosine)), nearest[part]]
    return nearest, similarity


def histogram(nearest: np.ndarray, num_domains: int) -> np.ndarray:
    """float64 [K]: the share of documents in each domain; adds up to 1.

    Raises:
      UserError: there are no documents.
    """
    if len(nearest) == 0:
        raise UserError("no documents: domain weights cannot be estimated")
    return np.bincount(nearest, minlength=num_domains).astype(np.float64) / len(nearest)


def top_terms(
    texts: Sequence[str], nearest: np.ndarray, num_domains: int, *, num_terms: int = 10
) -> list[list[str]]:
    """Per domain up to `num_terms` words whose mean TF-IDF most exceeds the mean over all texts."""
    import scipy.sparse
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(
        token_pattern=r"[^\W\d_]{3,}",
        stop_words="english",  # "his was she" sets a domain apart, but does not tell what it is
        max_features=_LABEL_FEATURES,
        max_df=0.5 if len(texts) > 20 else 1.0,
        dtype=np.float32,
    )
    try:
        counts = counter.fit_transform([text[:LABEL_CHARS] for text in texts])
    except ValueError:  # no words at all
        return [[] for _ in range(num_domains)]
    words = counter.get_feature_names_out()
    num_documents = np.bincount(counts.indices, minlength=len(words))
    idf = (np.log((1 + len(texts)) / (1 + num_documents)) + 1).astype(np.float32)
    tfidf = weigh(counts, idf)
    size = np.maximum(np.bincount(nearest, minlength=num_domains), 1)
    member = scipy.sparse.csr_matrix(
        ((1 / size[nearest]).astype(np.float32), (nearest, np.arange(len(texts)))),
        shape=(num_domains, len(texts)),
    )
    means, overall = (member @ tfidf).tocsr(), np.asarray(tfidf.mean(axis=0)).ravel()
    result = []
    for k in range(num_domains):  # a dense [K, words] table would be 300 MB at K = 4,096
        excess = means[[k]].toarray().ravel() - overall
        best = np.argsort(-excess, kind="stable")[:num_terms]
        result.append([str(words[i]) for i in best if excess[i] > 0])
    return result


def _kmeans(rows: np.ndarray, num_clusters: int) -> np.ndarray:
    import sklearn.cluster
    import sklearn.exceptions

    if num_clusters == 1:
        return rows.mean(axis=0, keepdims=True)
    kmeans = sklearn.cluster.KMeans(num_clusters, n_init=1, max_iter=100, random_state=0)
    with warnings.catch_warnings():
        # Rows too alike for so many clusters: `_fill_empty` puts it right, or says it plainly.
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        return kmeans.fit(rows).cluster_centers_


def _two_levels(rows: np.ndarray, num_domains: int) -> np.ndarray:
    top = unit_rows(_kmeans(rows, round(num_domains**0.5)))
    nearest, _ = assign(rows, top)
    size = np.bincount(nearest, minlength=len(top))
    share = shares(size, num_domains)
    parts = [_kmeans(rows[nearest == c], share[c]) for c in range(len(top)) if share[c]]
    return np.concatenate(parts)


def shares(size: np.ndarray, total: int) -> np.ndarray:
    """int [c] that add up to `total`, in proportion to `size`, none larger than its size.

    `total` must not exceed the sum of sizes.
    """
    share = np.minimum(size * total // size.sum(), size)
    while share.sum() < total:  # the rest goes where the most rows stand behind one share
        c = np.argmax(np.where(share < size, size / (share + 1), -1))
        share[c] += 1
    return share


def _fill_empty(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Move centroids that no row is nearest to onto the rows that are worst served."""
    for _ in range(len(centroids)):
        nearest, similarity = assign(rows, centroids)
        empty = np.setdiff1d(np.arange(len(centroids)), nearest)
        if not len(empty):
            return centroids
        # A cluster's only row must stay with it, or filling one hole would open another.
        alone = np.bincount(nearest, minlength=len(centroids))[nearest] == 1
        worst = np.argsort(np.where(alone, 2, similarity), kind="stable")
        _, first = np.unique(rows[worst], axis=0, return_index=True)
        worst = worst[np.sort(first)][: len(empty)]
        centroids[empty[: len(worst)]] = rows[worst]
    raise UserError(
        f"only {len(np.unique(assign(rows, centroids)[0]))} of {len(centroids)} domains can be "
        "told apart: the train documents are too few or too alike. Lower --config.num_domains"
    )
