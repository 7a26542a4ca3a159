"""Domains: a tree of k-means centroids of document embeddings, nearest centroid, labels.

1. `fit_tree`      unit embeddings [n, dim]     -> Tree of centroids, unit rows
2. `Tree.assign`   embeddings                   -> nearest domain and cosine similarities per row
3. `histogram`     nearest domains [n]          -> h [K], the domain weights of these documents
4. `top_terms`     texts, their domains         -> words that tell a domain from the others

A tree has one level or several: 64 clusters, say, each cut into its share of 4,096. A document goes
down it, to the nearest centroid of the first level and to the nearest of that one's own, so that
the coarser level is what it would be without the finer one, and a domain of it is a range of those.

A document without a direction (a row of zeros) has similarity 0 and falls to domain 0, as every
document of a corpus must lie somewhere; `domain_histogram` counts it for none. This module knows
neither files nor tokens.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import threadpoolctl

from soup_jax.data.embed.base import unit_rows
from soup_jax.data.embed.tfidf_svd import weigh
from soup_jax.errors import UserError

# Above this many domains, the levels of a tree are made where none are asked for.
FLAT_DOMAINS = 1024
QUANTILES = (0.01, 0.05, 0.5)
LABEL_CHARS = 2_000  # of a document; its beginning says what it is about
_LABEL_FEATURES = 20_000
_ROWS = 4096
_ITERATIONS = 100  # of k-means, at most


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """Centroids in levels, from coarse to fine; those of the last level are the domains.

    Attributes:
      centroids: of each level, float32 [K_l, dim], unit rows.
      begins: of each level but the last, int64 [K_l + 1]: the centroids of the next level that
        belong to centroid c are `begins[c]` to `begins[c + 1]`, without the last.
    """

    centroids: tuple[np.ndarray, ...]
    begins: tuple[np.ndarray, ...] = ()

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> "Tree":
        """The tree whose `tensors` these are; others among them are passed over."""
        coarse = sorted(int(name[10:]) for name in tensors if name.startswith("centroids/"))
        return cls(
            (*(tensors[f"centroids/{size}"] for size in coarse), tensors["centroids"]),
            tuple(tensors[f"begins/{size}"] for size in coarse),
        )

    def tensors(self) -> dict[str, np.ndarray]:
        """What `of` takes, by names for a file: of the last level, `centroids`."""
        *coarse, fine = self.centroids
        named = {f"centroids/{len(c)}": c for c in coarse}
        return named | {f"begins/{len(b) - 1}": b for b in self.begins} | {"centroids": fine}

    @property
    def sizes(self) -> tuple[int, ...]:
        """K_l of each level; the last is K."""
        return tuple(map(len, self.centroids))

    def cut(self, num_domains: int) -> "Tree":
        """The tree down to the level that has so many centroids; ValueError if there is none."""
        levels = self.sizes.index(num_domains) + 1
        return Tree(self.centroids[:levels], self.begins[: levels - 1])

    def ranges(self, level: int) -> np.ndarray:
        """int64 [K_l + 1]: the domains below centroid c of a level are [c] to [c + 1]."""
        ends = np.arange(self.sizes[level] + 1)
        for begins in self.begins[level:]:
            ends = begins[ends]
        return ends

    def assign(
        self, embeddings: np.ndarray, allowed_K: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(nearest int32 [n], similarity float32 [n, levels]) of embeddings [n, dim].

        Similarity is the cosine to the centroid of each level; among equals the lowest wins.

        Args:
          allowed_K: bool, the domains that there are; default all.
        """
        nearest = np.zeros(len(embeddings), np.int32)
        similarity = np.zeros((len(embeddings), len(self.centroids)), np.float32)
        for level, centroids in enumerate(self.centroids):
            begins = self.begins[level - 1] if level else np.array([0, len(centroids)])
            allowed = np.ones(len(centroids), bool)
            if allowed_K is not None:
                ranges = self.ranges(level)
                allowed = np.logical_or.reduceat(allowed_K, ranges[:-1])
            parents, nearest = nearest, np.zeros_like(nearest)
            for parent in np.unique(parents):
                rows = np.flatnonzero(parents == parent)
                own = np.arange(begins[parent], begins[parent + 1])
                own = own[allowed[own]]
                found, similarity[rows, level] = assign(embeddings[rows], centroids[own])
                nearest[rows] = own[found]
        return nearest, similarity


def fit_tree(embeddings: np.ndarray, num_domains: int, levels: Sequence[int] = ()) -> Tree:
    """A tree of spherical k-means on unit embeddings [n, dim], with `num_domains` at its end.

    Deterministic. Every centroid is the nearest one of at least one row. A level cuts each cluster
    of the one before into a share of its size in proportion to the cluster's rows. Flat k-means
    costs n * K * dim per iteration and, with thousands of seeds, leaves many in a few dense spots;
    two levels cost about n * sqrt(K) * dim and spread them.

    Args:
      levels: sizes of the levels before, ascending; default: none, or sqrt(K) above FLAT_DOMAINS.

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

    centroids: list[np.ndarray] = []
    begins: list[np.ndarray] = []
    clusters = [rows]
    with threadpoolctl.threadpool_limits(1):
        for size in (*level_sizes(num_domains, levels), num_domains):
            share = np.array([size])
            if centroids:
                different = np.array([len(np.unique(c, axis=0)) for c in clusters])
                if different.sum() < size:
                    raise _too_alike(int(different.sum()), size)
                share = shares(np.array(list(map(len, clusters))), size, most=different)
                begins.append(np.concatenate([[0], np.cumsum(share)]))
            found = [
                _fill_empty(cluster, _kmeans(cluster, number))
                for cluster, number in zip(clusters, share.tolist())
            ]
            centroids.append(np.concatenate(found))
            if size < num_domains:
                nearest = [assign(cluster, own)[0] for cluster, own in zip(clusters, found)]
                clusters = [
                    cluster[near == c]
                    for cluster, near, own in zip(clusters, nearest, found)
                    for c in range(len(own))
                ]
    return Tree(tuple(centroids), tuple(begins))


def level_sizes(num_domains: int, levels: Sequence[int] = ()) -> tuple[int, ...]:
    """The sizes of the levels before the last."""
    if not levels and num_domains > FLAT_DOMAINS:
        return (round(num_domains**0.5),)
    return tuple(levels)


def assign(embeddings: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(nearest int32 [n], similarity float32 [n]) of embeddings [n, dim] to centroids [c, dim].

    Similarity is the cosine; among equals the lowest centroid wins.
    """
    nearest = np.zeros(len(embeddings), np.int32)
    similarity = np.zeros(len(embeddings), np.float32)
    for start in range(0, len(embeddings), _ROWS):
        part = slice(start, start + _ROWS)
        cosine = embeddings[part] @ centroids.T
        nearest[part] = cosine.argmax(axis=1)
        similarity[part] = cosine[np.arange(len(cosine)), nearest[part]]
    return nearest, similarity


def gini(sizes: np.ndarray) -> float:
    """How unequal sizes are: 0 if all are the same, towards 1 if one has all."""
    ordered = np.sort(np.asarray(sizes, np.float64))
    rank = np.arange(1, len(ordered) + 1)
    return float(2 * (rank * ordered).sum() / (len(ordered) * ordered.sum()) - 1 - 1 / len(ordered))


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
    # Unit centroids [c, dim]: Lloyd's steps by distance, and from there by cosine, as documents are
    # assigned. By distance alone a scattered cluster, whose mean is short, would reach too far.
    import sklearn.cluster
    import sklearn.exceptions

    if num_clusters == 1:
        return unit_rows(rows.mean(axis=0, keepdims=True))
    kmeans = sklearn.cluster.KMeans(num_clusters, n_init=1, max_iter=_ITERATIONS, random_state=0)
    with warnings.catch_warnings():
        # Rows too alike for so many clusters: `_fill_empty` puts it right, or says it plainly.
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        centroids = unit_rows(kmeans.fit(rows).cluster_centers_)
    nearest = np.full(len(rows), -1)
    for _ in range(_ITERATIONS):
        before, nearest = nearest, assign(rows, centroids)[0]
        if np.array_equal(nearest, before):
            break
        found, sums = _sums(rows, nearest, num_clusters)
        centroids[found] = unit_rows(sums[found])
    return centroids


def _sums(
    rows: np.ndarray, nearest: np.ndarray, num_clusters: int
) -> tuple[np.ndarray, np.ndarray]:
    # Which clusters have rows, bool [c], and the sum of the rows of each, float32 [c, dim].
    import scipy.sparse

    ones = (np.ones(len(rows), np.float32), (nearest, np.arange(len(rows))))
    member = scipy.sparse.csr_matrix(ones, shape=(num_clusters, len(rows)))
    return np.bincount(nearest, minlength=num_clusters) > 0, member @ rows


def shares(size: np.ndarray, total: int, *, most: np.ndarray) -> np.ndarray:
    """int [c] that add up to `total`, about in proportion to `size`, each from 1 to its `most`.

    `total` must be from the number of sizes to the sum of `most`.
    """
    share = np.clip(size * total // size.sum(), 1, most)
    while share.sum() < total:  # the rest goes where the most rows stand behind one share
        share[np.argmax(np.where(share < most, size / (share + 1), -1))] += 1
    while share.sum() > total:  # those of 1 that had less
        share[np.argmin(np.where(share > 1, size / share, np.inf))] -= 1
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
    raise _too_alike(len(np.unique(assign(rows, centroids)[0])), len(centroids))


def _too_alike(found: int, wanted: int) -> UserError:
    return UserError(
        f"only {found} of {wanted} domains can be told apart: the train documents are too few or "
        "too alike. Lower --config.num_domains"
    )
