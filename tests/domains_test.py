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
    tree = domains.fit_tree(rows, 6)
    (centroids,) = tree.centroids
    assert centroids.shape == (6, 16)
    assert centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    nearest, similarity = domains.assign(rows, centroids)
    assert len({(b, k) for b, k in zip(blob, nearest)}) == 6
    assert similarity.min() > 0.9


def test_centroids_are_where_the_cosine_to_their_own_rows_is_largest():
    # A wide cluster beside a narrow one: by distance the wide one would take rows of the other.
    rng = np.random.default_rng(0)
    wide = unit_rows(np.array([1.0, 0, 0, 0]) + 0.9 * rng.normal(size=(400, 4)))
    narrow = unit_rows(np.array([0, 1.0, 0, 0]) + 0.2 * rng.normal(size=(100, 4)))
    rows = np.concatenate([wide, narrow])
    (centroids,) = domains.fit_tree(rows, 3).centroids
    nearest, _ = domains.assign(rows, centroids)
    means = unit_rows(np.stack([rows[nearest == k].sum(axis=0) for k in range(3)]))
    np.testing.assert_allclose(centroids, means, atol=1e-6)


@pytest.mark.parametrize("num_domains", [1, 2, 30, 60])
@pytest.mark.parametrize("levels", [(), (1,), (7,), (3, 8)])
def test_every_domain_has_a_document(num_domains, levels):
    levels = tuple(size for size in levels if size < num_domains)
    rows, _ = blobs(60, 7)
    # Heavy duplication tempts k-means into centroids that nobody is nearest to.
    rows = np.concatenate([rows, np.repeat(rows[:2], 500, axis=0), np.zeros((5, 16), np.float32)])
    tree = domains.fit_tree(rows, num_domains, levels)
    assert tree.sizes == (*levels, num_domains)
    nearest, similarity = tree.assign(rows[:-5])
    assert set(nearest) == set(range(num_domains))
    assert similarity.shape == (len(rows) - 5, len(tree.sizes))
    again = domains.fit_tree(rows, num_domains, levels)
    for one, other in zip(tree.centroids, again.centroids, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_tree_is_walked_down_and_its_levels_are_flat_ones():
    rows, _ = blobs(2000, 40)
    tree = domains.fit_tree(rows, 40, (5,))
    assert [b.tolist()[0] for b in tree.begins] == [0]
    assert tree.begins[0][-1] == 40
    nearest, similarity = tree.assign(rows)
    top, cosine = domains.assign(rows, tree.centroids[0])
    np.testing.assert_array_equal(similarity[:, 0], cosine)
    ranges = tree.ranges(0)
    np.testing.assert_array_equal(np.searchsorted(ranges, nearest, side="right") - 1, top)
    for c in range(5):
        own = slice(ranges[c], ranges[c + 1])
        expected = domains.assign(rows[top == c], tree.centroids[1][own])
        np.testing.assert_array_equal(nearest[top == c] - ranges[c], expected[0])
        np.testing.assert_array_equal(similarity[top == c, 1], expected[1])
    # The coarse level is the tree of that size: nothing below it moved it.
    flat = domains.fit_tree(rows, 5)
    np.testing.assert_array_equal(tree.cut(5).centroids[0], flat.centroids[0])
    np.testing.assert_array_equal(tree.cut(5).assign(rows)[0], top)
    kept = domains.Tree.of(tree.tensors())
    np.testing.assert_array_equal(kept.assign(rows)[0], nearest)
    np.testing.assert_array_equal(kept.ranges(1), np.arange(41))
    # What is not allowed is nobody's, and the others keep theirs.
    allowed = np.ones(40, bool)
    allowed[own] = False
    elsewhere, _ = tree.assign(rows, allowed)
    assert allowed[elsewhere].all()
    np.testing.assert_array_equal(elsewhere[top != 4], nearest[top != 4])
    # Three levels are walked like two.
    deep = domains.fit_tree(rows, 40, (2, 8))
    np.testing.assert_array_equal(deep.ranges(0), deep.begins[1][deep.begins[0]])


def test_many_domains_have_a_level_above_by_themselves(monkeypatch):
    monkeypatch.setattr(domains, "FLAT_DOMAINS", 20)
    assert domains.level_sizes(20) == ()
    assert domains.level_sizes(21) == (5,)
    assert domains.level_sizes(30, (3, 9)) == (3, 9)


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
domains.fit_tree(np.eye(4, dtype=np.float32), 2)
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
        domains.fit_tree(np.concatenate([rows, np.zeros_like(rows)]), 6)
    with pytest.raises(UserError, match="only 5 of 8"):
        domains.fit_tree(np.repeat(rows, 10, axis=0), 8)
    with pytest.raises(UserError, match="only 5 of 7 domains can be told apart"):
        domains.fit_tree(np.repeat(rows, 10, axis=0), 7, (2,))


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
        size = rng.integers(1, 100, 12)
        most = np.minimum(size, rng.integers(1, 100, 12))
        total = int(rng.integers(12, most.sum() + 1))
        share = domains.shares(size, total, most=most)
        assert share.sum() == total
        assert (share >= 1).all()
        assert (share <= most).all()
        unbound = domains.shares(size, total, most=size) if total <= size.sum() else share
        assert (np.abs(unbound - size * total / size.sum()) < 12).all()
    sizes = np.array([80, 15, 5])
    np.testing.assert_array_equal(domains.shares(sizes, 10, most=sizes), [8, 1, 1])


def test_gini_coefficient():
    assert domains.gini(np.full(9, 3)) == pytest.approx(0, abs=1e-12)
    assert domains.gini(np.array([0, 0, 0, 8])) == pytest.approx(0.75)
    sizes = np.array([1.0, 2, 3, 10])
    gaps = np.abs(sizes[:, None] - sizes).sum()  # its definition
    assert domains.gini(sizes) == pytest.approx(gaps / (2 * 4 * 4 * sizes.mean()))


def test_labels_name_what_sets_a_domain_apart():
    texts = ["the oven and the dough rise"] * 10 + ["the kernel and the driver load"] * 10
    nearest = np.repeat([0, 2], 10)
    terms = domains.top_terms(texts, nearest, 3, num_terms=2)
    assert set(terms[0]) <= {"oven", "dough", "rise"}
    assert set(terms[2]) <= {"kernel", "driver", "load"}
    assert len(terms[0]) == len(terms[2]) == 2
    assert terms[1] == []
    assert domains.top_terms(["1 2", "3"], np.array([0, 1]), 2) == [[], []]
