import jax
import numpy as np
import pytest
from conftest import tiny_config

from soup_jax.data import corpus as windows
from soup_jax.data import loader
from soup_jax.data import meta_distribution as domain_weights
from soup_jax.data.sampling import SamplingPlan
from soup_jax.errors import UserError
from soup_jax.soup import layout as sharding
from soup_jax.training import build

B = 16


@pytest.fixture(scope="module")
def corpus(tiny_corpus):
    return windows.open_corpus(tiny_corpus)


def make_plan(corpus):
    meta = domain_weights.from_config(tiny_config(), corpus.domain_frequencies)
    return SamplingPlan(
        meta,
        num_windows_K=np.diff(corpus.offsets["train"]),
        batch_size=B,
        num_mixtures=2,
        seed=5,
    )


def read(corpus, rows, *, start=0, stop=10, num_threads=2):
    return list(
        loader.batches(
            corpus,
            make_plan(corpus),
            rows=rows,
            start_step=start,
            num_steps=stop,
            num_threads=num_threads,
            prefetch=4,
        )
    )


def test_a_batch_is_what_the_plan_says(corpus):
    plan = make_plan(corpus)
    for step, batch in enumerate(read(corpus, np.arange(B))):
        expected = plan[step]
        np.testing.assert_array_equal(batch.domain_B, expected.domain_B)
        np.testing.assert_allclose(batch.h_MK, expected.h_MK, atol=1e-7)
        ids = corpus.offsets["train"][expected.domain_B] + expected.window_B
        np.testing.assert_array_equal(batch.rows["tokens"], corpus.read_windows("train", ids))


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(corpus, num_processes):
    whole = read(corpus, np.arange(B))
    parts = [read(corpus, rows) for rows in np.split(np.arange(B), num_processes)]
    for step, batch in enumerate(whole):
        joined = [np.concatenate([p[step].domain_B for p in parts])]
        joined += [np.concatenate([p[step].rows[name] for p in parts]) for name in batch.rows]
        for found, wanted in zip(joined, (batch.domain_B, *batch.rows.values()), strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_starting_late_and_more_threads_change_nothing(corpus):
    whole = read(corpus, np.arange(B))
    late = read(corpus, np.arange(B), start=6, num_threads=5)
    assert len(late) == 4
    for a, b in zip(whole[6:], late):
        np.testing.assert_array_equal(a.rows["tokens"], b.rows["tokens"])


def test_only_the_last_window_of_a_domain_has_padding(corpus):
    sizes = np.diff(corpus.offsets["train"])
    domain = np.repeat(np.arange(corpus.num_domains), sizes)
    window = np.arange(sizes.sum()) - corpus.offsets["train"][domain]
    real = corpus.num_targets("train", corpus.offsets["train"][domain] + window)
    assert (real[window < sizes[domain] - 1] == corpus.seq_len).all()
    last = corpus.seq_len - np.asarray(corpus.pad["train"])
    np.testing.assert_array_equal(real[window == sizes[domain] - 1], last[sizes > 0])


def test_device_arrays_are_the_batch_with_rows_over_the_whole_mesh(corpus):
    m = build.make_mesh(tiny_config())
    rows = loader.process_rows(sharding.batch(m), B)
    np.testing.assert_array_equal(rows, np.arange(B))
    batch = read(corpus, rows, stop=1)[0]
    arrays = loader.to_device(batch, m)
    jax.tree.map(np.testing.assert_array_equal, arrays, batch)
    tokens = arrays.rows["tokens"]
    assert {s.data.shape[0] for s in tokens.addressable_shards} == {B // m.size}
    assert arrays.h_MK.sharding.is_fully_replicated
    assert m.size == jax.device_count()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_domains": 7}, "num_domains is 7, the corpus has 6"),
        ({"seq_len": 64}, "seq_len is 64, the corpus has windows of 32"),
        ({"vocab_size": 300}, "vocab_size is 300, the tokenizer has"),
    ],
)
def test_refuses_a_corpus_that_does_not_fit(corpus, change, message):
    fits = {"num_domains": 6, "seq_len": 32, "vocab_size": 400}
    loader.check_corpus(corpus, **fits)
    with pytest.raises(UserError, match=message):
        loader.check_corpus(corpus, **(fits | change))
