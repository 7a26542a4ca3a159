"""Domains: centroids that are all used, nearest by cosine, histograms, labels."""

import os
import subprocess
import sys

import numpy as np
import pytest

from soup_jax.data import domains
from soup_jax.data.embed.base import unit_rows
from soup_jax.errors import UserError


def blobs(num: int, num_blobs: int, dim: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(num_blobs, dim))
    blob = np.arange(num) % num_blobs
    return unit_rows(centers[blob] + 0.05 * rng.normal(size=(num, dim))), blob


def test_separate_blobs_become_domains():
    rows, blob = blobs(300, 6)
    centroids = domains.fit_centroids(rows, 6)
    assert centroids.shape == (6, 16)
    assert centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    nearest, similarity = domains.assign(rows, centroids)
    assert len({(b, k) for b, k in zip(blob, nearest)}) == 6
    assert similarity.min() > 0.9


@pytest.mark.parametrize("num_domains", [1, 2, 30, 60])
@pytest.mark.parametrize("flat", [1000, 1])
def test_every_domain_has_a_document(num_domains, flat, monkeypatch):
    monkeypatch.setattr(domains, "FLAT_DOMAINS", flat)
    rows, _ = blobs(60, 7)
    # Heavy duplication tempts k-means into centroids that nobody is nearest to.
    rows = np.concatenate([rows, np.repeat(rows[:2], 500, axis=0), np.zeros((5, 16), np.float32)])
    centroids = domains.fit_centroids(rows, num_domains)
    assert centroids.shape == (num_domains, 16)
    nearest, _ = domains.assign(rows[:-5], centroids)
    assert set(nearest) == set(range(num_domains))
    np.testing.assert_array_equal(domains.fit_centroids(rows, num_domains), centroids)


# A continued `prepare` comes here without having used scikit-learn. With two threads its sums have
# other last bits on large corpora; on a small one only the number of threads shows it.
THREADS_PROGRAM = """
import numpy as np, threadpoolctl
from soup_jax.data import domains
seen = set()
def kmeans(rows, num_clusters):
    import sklearn.cluster
    seen.update((p["user_api"], p["num_threads"]) for p in threadpoolctl.threadpool_info())
    return rows[:num_clusters]
domains._kmeans = kmeans
domains.fit_centroids(np.eye(4, dtype=np.float32), 2)
assert seen == {("blas", 1), ("openmp", 1)}, seen
"""


def test_k_means_has_one_thread_in_a_process_that_had_not_used_scikit_learn():
    subprocess.run(
        [sys.executable, "-c", THREADS_PROGRAM],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )


def test_holes_are_filled_without_opening_others():
    rows, _ = blobs(40, 40)
    centroids = np.repeat(rows[:1], 40, axis=0)
    filled = domains._fill_empty(rows, centroids)
    assert set(domains.assign(rows, filled)[0]) == set(range(40))


def test_too_few_documents_or_different_ones_are_a_user_error():
    rows, _ = blobs(5, 5)
    with pytest.raises(UserError, match=r"only 5 train documents .*num_domains"):
        domains.fit_centroids(np.concatenate([rows, np.zeros_like(rows)]), 6)
    with pytest.raises(UserError, match="only 5 of 8"):
        domains.fit_centroids(np.repeat(rows, 10, axis=0), 8)


def test_assign_is_the_nearest_by_cosine():
    rows, _ = blobs(5000, 50)  # more than one block
    centroids, _ = blobs(20, 20, seed=1)
    nearest, similarity = domains.assign(rows, centroids)
    cosine = rows.astype(np.float64) @ centroids.astype(np.float64).T
    np.testing.assert_allclose(similarity, cosine.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(cosine[np.arange(5000), nearest], cosine.max(axis=1), atol=1e-6)
    assert nearest.dtype == np.int32
    assert similarity.dtype == np.float32
    nearest, similarity = domains.assign(np.zeros((1, 16), np.float32), centroids)
    assert (nearest[0], similarity[0]) == (0, 0)


def test_histogram():
    h = domains.histogram(np.array([3, 0, 3, 3], np.int32), 5)
    np.testing.assert_array_equal(h, [0.25, 0, 0, 0.75, 0])
    assert h.dtype == np.float64
    with pytest.raises(UserError, match="no documents"):
        domains.histogram(np.array([], np.int32), 5)


def test_shares_are_fair_and_possible():
    rng = np.random.default_rng(0)
    for _ in range(50):
        size = rng.integers(0, 100, 12)
        total = int(rng.integers(1, size.sum() + 1))
        share = domains.shares(size, total)
        assert share.sum() == total
        assert (share >= 0).all()
        assert (share <= size).all()
        assert (np.abs(share - size * total / size.sum()) < 12).all()
    np.testing.assert_array_equal(domains.shares(np.array([80, 15, 5]), 10), [9, 1, 0])


def test_labels_name_what_sets_a_domain_apart():
    texts = ["the oven and the dough rise"] * 10 + ["the kernel and the driver load"] * 10
    nearest = np.repeat([0, 2], 10)
    terms = domains.top_terms(texts, nearest, 3, num_terms=2)
    assert set(terms[0]) <= {"oven", "dough", "rise"}
    assert set(terms[2]) <= {"kernel", "driver", "load"}
    assert len(terms[0]) == len(terms[2]) == 2
    assert terms[1] == []
    assert domains.top_terms(["1 2", "3"], np.array([0, 1]), 2) == [[], []]
