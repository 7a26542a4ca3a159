import concurrent.futures

import numpy as np
import pytest

from soup_jax.data import sampling as sampler
from soup_jax.data.meta_distribution import MetaDistribution
from soup_jax.data.sampling import SamplingPlan, shuffled_index

NUM_WINDOWS = np.array([7, 1, 40, 0, 130])
FREQUENCIES = NUM_WINDOWS / NUM_WINDOWS.sum()


def plan(
    *, probabilities=(0.6, 0.2, 0.2, 0.0), seed=1, batch_size=12, num_mixtures=3, rows=None, skip=()
):
    meta = MetaDistribution(probabilities, FREQUENCIES, 1, 3, 5.0, rows)
    return SamplingPlan(
        meta,
        num_windows_K=NUM_WINDOWS,
        batch_size=batch_size,
        num_mixtures=num_mixtures,
        seed=seed,
        skip=skip,
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 63, 64, 65, 1000, 4097])
def test_shuffled_index_is_a_permutation(size):
    n = np.arange(size)
    for key in (0, 1, 2**63):
        out = shuffled_index(n, np.full(size, size), np.full(size, key, np.uint64))
        np.testing.assert_array_equal(np.sort(out), n)


def test_shuffled_index_reaches_all_orders_of_three_evenly():
    count = 3000
    key = np.repeat(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15), 3)
    out = shuffled_index(np.tile(np.arange(3), count), np.full(3 * count, 3), key).reshape(-1, 3)
    orders = np.unique(out, axis=0, return_counts=True)[1]
    assert len(orders) == 6
    assert (abs(orders - count / 6) < 5 * np.sqrt(count / 6)).all()


def test_windows_of_a_domain_are_all_seen_once_per_epoch():
    p, seen = plan(), {}
    for step in range(400):
        s = p[step]
        for domain, window, epoch in zip(s.domain_B, s.window_B, s.epoch_B):
            seen.setdefault((domain, epoch), []).append(window)
    complete = 0
    for domain in (0, 1, 2, 4):
        epochs = sorted(e for d, e in seen if d == domain)
        assert epochs == list(range(len(epochs)))
        for epoch in epochs[:-1]:
            assert sorted(seen[domain, epoch]) == list(range(NUM_WINDOWS[domain]))
            complete += 1
        last = seen[domain, epochs[-1]]
        assert len(set(last)) == len(last)
    assert complete > 10


def test_epochs_of_a_domain_have_different_orders():
    p, order = plan(), {}
    for step in range(400):
        for d, w, e in zip(p[step].domain_B, p[step].window_B, p[step].epoch_B):
            if d == 2:
                order.setdefault(e, []).append(w)
    assert order[0] != order[1]


def test_domains_match_h_within_a_binomial_bound():
    h = np.array([0.5, 0.05, 0.2, 0.0, 0.25])
    p = plan(probabilities=(0.0, 0.0, 0.0, 1.0), rows=h[None], batch_size=100, num_mixtures=1)
    count = np.bincount(np.concatenate([p[s].domain_B for s in range(200)]), minlength=5)
    bound = 4.5 * np.sqrt(20_000 * h * (1 - h))
    assert (abs(count - 20_000 * h) <= bound).all()


def test_rows_of_a_mixture_come_from_its_own_support():
    p = plan()
    for step in range(100):
        s = p[step]
        for h_K, domains in zip(s.h_MK, s.domain_B.reshape(3, -1)):
            assert (h_K[domains] > 0).all()


def same(a, b):
    fields = ("h_MK", "domain_B", "window_B", "epoch_B")
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in fields)


def test_pure_in_seed_and_step_whatever_the_order_of_asking():
    forward = plan()
    expected = [forward[s] for s in range(60)]
    backward = plan()
    assert all(same(backward[s], expected[s]) for s in reversed(range(60)))
    assert not same(plan(seed=2)[0], expected[0])


def test_threads_see_the_same_plan():
    expected = plan()
    shared = plan()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda s: shared[s], list(range(200))))
    assert all(same(r, expected[s]) for s, r in enumerate(results))


def test_restored_cursors_continue_the_plan():
    p = plan()
    expected = [p[s] for s in range(50)]
    fresh = plan()
    fresh.restore(30, p.cursors(30))
    assert all(same(fresh[s], expected[s]) for s in range(30, 50))
    assert same(fresh[3], expected[3])


@pytest.mark.parametrize("skip", [((0, 0),), ((2, 3), (4, 4), (9, 700)), ((49, 60),)])
def test_skipped_steps_of_the_plan_are_left_out_and_nothing_else_changes(skip):
    whole, left = plan(), plan(skip=skip)
    skipped = {i for first, last in skip for i in range(first, last + 1)}
    kept = [i for i in range(800) if i not in skipped]
    assert [left.index(step) for step in range(60)] == kept[:60]
    assert all(same(left[step], whole[kept[step]]) for step in (*range(60), 3, 0))
    # Cursors taken before a range was left out continue with it, and without it again.
    for resumed, index in ((plan(skip=skip), kept.__getitem__), (plan(), lambda step: step)):
        resumed.restore(5, whole.cursors(5))
        assert all(same(resumed[step], whole[index(step)]) for step in (7, 6, 30))


def test_asking_out_of_order_draws_no_step_twice():
    p, drawn = plan(), []
    draw = p._draw
    p._draw = lambda step: (drawn.append(step), draw(step))[1]
    p.restore(1000, np.arange(5))
    for step in (1090, 1003, 1000, 1300, 1100):
        p[step]
    assert drawn == list(range(1000, 1000 + len(drawn)))
    # Nor does a checkpoint of a step that the readers have left behind.
    expected = plan()
    expected.restore(1000, np.arange(5))
    np.testing.assert_array_equal(p.cursors(1200), expected.cursors(1200))
    assert len(drawn) == len(set(drawn))


def test_old_domain_weights_are_forgotten_and_come_back(monkeypatch):
    forward = plan()
    expected = [forward[s] for s in range(300)]
    monkeypatch.setattr(sampler, "_RECENT_BYTES", 1)
    p = plan()
    assert all(same(p[s], expected[s]) for s in range(300))
    assert sum(kept.h_MK is not None for kept in p._recent.values()) < 300
    assert all(same(p[s], expected[s]) for s in range(300))


def test_the_plan_is_that_of_all_earlier_versions():
    # Published runs were trained on these windows: a faster plan must be the same plan.
    rows = np.array([[0.5, 0.05, 0.2, 0, 0.25], [0, 1, 0, 0, 0]])
    p = plan(probabilities=(0.6, 0.2, 0.0, 0.2), rows=rows)
    s = p[300]
    assert s.domain_B.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert s.window_B.tolist() == [6, 0, 2, 1, 5, 4, 3, 1, 0, 0, 0, 0]
    assert s.epoch_B.tolist() == [108] * 7 + [109, 958, 959, 960, 961]
    assert p.fingerprint() == "725eb6f50abb2ada7816212dfb61dd44874c1ac83fc13911e1e36ef8d959f09d"
    num_windows = np.arange(4096) * 7919 % 600 + 1
    num_windows[[5, 70]] = 0
    frequencies, rows = num_windows / num_windows.sum(), np.eye(4096)[[9, 99]]
    meta = MetaDistribution((0.7, 0.2, 0.0, 0.1), frequencies, 1, 64, 8.0, rows, 1.0)
    s = SamplingPlan(meta, num_windows_K=num_windows, batch_size=16, num_mixtures=8, seed=3)[29]
    assert s.domain_B.tolist() == [
        1186, 1186, 3713, 3713, 3453, 3453, 2762, 1452,
        2278, 166, 389, 389, 2480, 1933, 3519, 3194,
    ]  # fmt: skip
    assert s.window_B.tolist() == [
        122, 46, 36, 240, 271, 28, 345, 252, 110, 209, 72, 66, 502, 212, 489, 88,
    ]  # fmt: skip
    assert (s.h_MK > 0).sum(axis=1).tolist() == [6, 1, 1, 4094, 6, 1, 6, 2]


def test_fingerprint_changes_with_everything_that_changes_the_plan():
    prints = {plan().fingerprint(), plan(seed=2).fingerprint()}
    prints |= {plan(batch_size=24).fingerprint(), plan(num_mixtures=4).fingerprint()}
    assert len(prints) == 4
