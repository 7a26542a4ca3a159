"""The embedder: unit rows, nothing for empty texts, the same after saving, for any worker count."""

import os
import time
import types

import numpy as np
import pytest

from soup_jax import storage as files
from soup_jax.data import embed
from soup_jax.errors import UserError

TOPICS = [
    "kernel module device driver interrupt memory scheduler thread",
    "flour butter sugar oven dough yeast recipe bake",
    "goal match striker league penalty referee season coach",
]


def topic_texts(num: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    topic = rng.integers(len(TOPICS), size=num)
    return [" ".join(rng.choice(TOPICS[t].split(), 30)) for t in topic], topic


def embed_config(**changes) -> types.SimpleNamespace:
    values = {"kind": "tfidf_svd", "dim": 6, "max_features": 500, "max_chars": 1000}
    return types.SimpleNamespace(**(values | changes))


@pytest.fixture(scope="module")
def embedder() -> embed.Embedder:
    return embed.fit_embedder(embed_config(), topic_texts(300)[0])


def test_rows_have_length_one_or_zero_and_topics_lie_apart(embedder):
    texts, topic = topic_texts(100, seed=1)
    rows = embedder.embed([*texts, "", "   ", "zzzz qqqq", "\ud800"])
    assert rows.shape == (104, embedder.dim)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows[:100], axis=1), 1, atol=1e-6)
    assert not rows[100:].any()
    cosine = rows[:100] @ rows[:100].T
    same = topic[:, None] == topic[None]
    assert cosine[same].min() > cosine[~same].max()
    assert embedder.embed([]).shape == (0, embedder.dim)


@pytest.mark.parametrize("max_features", [1, 3, 40, 10_000])
def test_terms_are_counted_as_a_count_vectorizer_counts_them(max_features):
    texts = [
        "",
        " ",
        "one",
        "One TWO one\ntwo  one, two!",
        "日本語 text テキスト 日本",
        "a b aa bb aa",
    ]
    texts += ["straße STRASSE ẞ İstanbul \u0301x", "\ud800 aa bb", *topic_texts(20)[0]]
    expected = embed._vectorizer(max_features).fit(texts[::2])
    counter = embed.TermCounter(expected.get_feature_names_out().tolist())
    for some in (texts, texts[:1], texts[1:4], []):
        counts = counter.transform(some)
        wanted = expected.transform(some) if some else counts
        assert counts.shape == (len(some), len(expected.vocabulary_))
        for name in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(counts, name), getattr(wanted, name))
            assert getattr(counts, name).dtype == getattr(wanted, name).dtype


def test_a_row_depends_on_its_text_only(embedder):
    texts, _ = topic_texts(700)  # more than one batch
    rows = embedder.embed(texts)
    np.testing.assert_array_equal(rows[650], embedder.embed([texts[650]])[0])


def test_only_the_first_characters_count():
    texts, _ = topic_texts(100)
    short = embed.fit_embedder(embed_config(max_chars=40), texts)
    np.testing.assert_array_equal(
        short.embed([texts[0]]), short.embed([texts[0][:40] + " something else entirely"])
    )


def test_against_scikit_learn():
    from sklearn.feature_extraction.text import TfidfTransformer

    texts, _ = topic_texts(50)
    counts = embed._vectorizer(100).fit_transform(texts)
    theirs = TfidfTransformer(sublinear_tf=True)
    expected = theirs.fit_transform(counts).toarray()
    ours = embed.weigh(counts, theirs.idf_.astype(np.float32)).toarray()
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    fitted = embed.TfidfSvd.fit(embed_config(max_features=100), texts)
    np.testing.assert_allclose(fitted._idf, theirs.idf_, rtol=1e-6)


def test_saved_and_loaded_is_the_same(embedder, tmp_path):
    embedder.save(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = embed.load_embedder(tmp_path)
    texts, _ = topic_texts(20, seed=2)
    np.testing.assert_array_equal(loaded.embed(texts), embedder.embed(texts))
    assert loaded.name == embedder.name


def test_the_number_of_workers_changes_no_bit(tmp_path):
    texts, _ = topic_texts(5000)
    for n in (1, 2):
        embed.fit_embedder(embed_config(), texts, num_workers=n).save(tmp_path / str(n))
    for name in ("embedder.json", "embedder.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_few_texts_give_fewer_dimensions():
    few = embed.fit_embedder(embed_config(dim=50), ["one two three", "two three four", "five six"])
    assert few.dim == 3
    assert np.isfinite(few.embed(["one two", "none known"])).all()


def test_scripts_without_spaces_have_words():
    texts = ["猫が好きです" * 3, "犬が好きです" * 3, "今日は天気がいい" * 3] * 4
    rows = embed.fit_embedder(embed_config(), texts).embed(["猫が好き", "犬が好き", "天気がいい"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert rows[0] @ rows[1] > rows[0] @ rows[2]


def test_what_cannot_be_fitted_or_loaded_is_a_user_error(embedder, tmp_path):
    with pytest.raises(UserError, match="no words"):
        embed.fit_embedder(embed_config(), ["!!!", "..."])
    with pytest.raises(UserError, match="'word2vec'; known are tfidf_svd"):
        embed.fit_embedder(embed_config(kind="word2vec"), ["a text"])
    with pytest.raises(UserError, match="does not exist"):
        embed.load_embedder(tmp_path)
    embedder.save(tmp_path)
    other = embed.fit_embedder(embed_config(), topic_texts(300, seed=5)[0])
    other.save(tmp_path / "other")
    os.replace(tmp_path / "other" / "embedder.safetensors", tmp_path / "embedder.safetensors")
    with pytest.raises(UserError, match="does not belong"):
        embed.load_embedder(tmp_path)
    (tmp_path / "embedder.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot read"):
        embed.load_embedder(tmp_path)
    files.write_json(tmp_path / "embedder.json", {"kind": "new"})
    with pytest.raises(UserError, match="unknown kind new"):
        embed.load_embedder(tmp_path)


def square(x: int) -> tuple[int, int]:
    return x * x, os.getpid()


def refuse(x: int) -> None:
    raise UserError(f"bad job {x}")


def die(x: int) -> None:
    os._exit(9)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_parallel_map_keeps_order_and_errors(num_workers):
    results = list(embed.parallel_map(square, [(i,) for i in range(20)], num_workers=num_workers))
    assert [r[0] for r in results] == [i * i for i in range(20)]
    assert (os.getpid() in {r[1] for r in results}) == (num_workers == 1)
    with pytest.raises(UserError, match="bad job"):
        list(embed.parallel_map(refuse, [(0,), (1,)], num_workers=num_workers))


def test_a_killed_worker_is_reported():
    with pytest.raises(UserError, match="num_workers"):
        list(embed.parallel_map(die, [(0,), (1,)], num_workers=2))


def test_a_worker_ends_with_its_parent(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    parents = iter([7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    embed._end_with(7)
    assert ended == [1]
