"""The embedder: unit rows, nothing for empty texts, the same after saving, for any worker count."""

import os
import time
import types

import numpy as np
import pytest

from soup_jax import storage as files
from soup_jax.data.embed import base, parallel, tfidf_svd
from soup_jax.data.embed.tfidf_svd import TfidfSvd
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
    values = {"dim": 6, "max_features": 500, "max_chars": 1000}
    return types.SimpleNamespace(**(values | changes))


@pytest.fixture(scope="module")
def embedder() -> TfidfSvd:
    return TfidfSvd.fit(embed_config(), topic_texts(300)[0])


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
    expected = tfidf_svd._vectorizer(max_features).fit(texts[::2])
    counter = tfidf_svd.TermCounter(expected.get_feature_names_out().tolist())
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
    short = TfidfSvd.fit(embed_config(max_chars=40), texts)
    np.testing.assert_array_equal(
        short.embed([texts[0]]), short.embed([texts[0][:40] + " something else entirely"])
    )


def test_against_scikit_learn():
    from sklearn.feature_extraction.text import TfidfTransformer

    texts, _ = topic_texts(50)
    counts = tfidf_svd._vectorizer(100).fit_transform(texts)
    theirs = TfidfTransformer(sublinear_tf=True)
    expected = theirs.fit_transform(counts).toarray()
    ours = tfidf_svd.weigh(counts, theirs.idf_.astype(np.float32)).toarray()
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    fitted = TfidfSvd.fit(embed_config(max_features=100), texts)
    np.testing.assert_allclose(fitted._idf, theirs.idf_, rtol=1e-6)


def test_saved_and_loaded_is_the_same(embedder, tmp_path):
    base.save_embedder(embedder, tmp_path, kind="tfidf_svd")
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = base.load_embedder(tmp_path)
    texts, _ = topic_texts(20, seed=2)
    np.testing.assert_array_equal(loaded.embed(texts), embedder.embed(texts))
    assert loaded.name == embedder.name


def test_the_number_of_workers_changes_no_bit(tmp_path):
    texts, _ = topic_texts(5000)
    for n in (1, 2):
        fitted = TfidfSvd.fit(embed_config(), texts, num_workers=n)
        base.save_embedder(fitted, tmp_path / str(n), kind="tfidf_svd")
    for name in ("embedder.json", "embedder.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_few_texts_give_fewer_dimensions():
    few = TfidfSvd.fit(embed_config(dim=50), ["one two three", "two three four", "five six"])
    assert few.dim == 3
    assert np.isfinite(few.embed(["one two", "none known"])).all()


def test_scripts_without_spaces_have_words():
    texts = ["猫が好きです" * 3, "犬が好きです" * 3, "今日は天気がいい" * 3] * 4
    rows = TfidfSvd.fit(embed_config(), texts).embed(["猫が好き", "犬が好き", "天気がいい"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert rows[0] @ rows[1] > rows[0] @ rows[2]


def test_what_cannot_be_fitted_or_loaded_is_a_user_error(embedder, tmp_path):
    with pytest.raises(UserError, match="no words"):
        TfidfSvd.fit(embed_config(), ["!!!", "..."])
    with pytest.raises(UserError, match="does not exist"):
        base.load_embedder(tmp_path)
    base.save_embedder(embedder, tmp_path, kind="tfidf_svd")
    other = TfidfSvd.fit(embed_config(), topic_texts(300, seed=5)[0])
    base.save_embedder(other, tmp_path / "other", kind="tfidf_svd")
    os.replace(tmp_path / "other" / "embedder.safetensors", tmp_path / "embedder.safetensors")
    with pytest.raises(UserError, match="does not belong"):
        base.load_embedder(tmp_path)
    (tmp_path / "embedder.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot read"):
        base.load_embedder(tmp_path)
    files.write_json(tmp_path / "embedder.json", {"kind": "new", "name": "x", "dim": 1})
    with pytest.raises(
        UserError, match=r"embedder.json: unknown embedder 'new'; known are minilm, tfidf_svd"
    ):
        base.load_embedder(tmp_path)


class Letters:
    """From outside: how often a text holds each letter."""

    name, dim = "letters-26", 26

    @classmethod
    def fit(cls, cfg, texts, *, num_workers=1):
        return cls()

    def embed(self, texts):
        counts = [[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]
        return base.unit_rows(np.array(counts, np.float32).reshape(-1, 26))

    def contents(self):
        return {"revision": 1}, {}

    @classmethod
    def load(cls, settings, tensors):
        assert (settings["revision"], tensors) == (1, {})
        return cls()


def test_an_embedder_from_outside_is_found_again(tmp_path):
    kind = f"{__name__}:Letters"
    letters = base.EMBEDDERS.get(kind).fit(embed_config(), [])
    base.save_embedder(letters, tmp_path, kind=kind)
    loaded = base.load_embedder(tmp_path)
    assert isinstance(loaded, Letters)
    np.testing.assert_array_equal(loaded.embed(TOPICS), letters.embed(TOPICS))


def square(x: int) -> tuple[int, int]:
    return x * x, os.getpid()


def refuse(x: int) -> None:
    raise UserError(f"bad job {x}")


def die(x: int) -> None:
    os._exit(9)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_parallel_map_keeps_order_and_errors(num_workers):
    results = list(
        parallel.parallel_map(square, [(i,) for i in range(20)], num_workers=num_workers)
    )
    assert [r[0] for r in results] == [i * i for i in range(20)]
    assert (os.getpid() in {r[1] for r in results}) == (num_workers == 1)
    with pytest.raises(UserError, match="bad job"):
        list(parallel.parallel_map(refuse, [(0,), (1,)], num_workers=num_workers))


def test_a_killed_worker_is_reported():
    with pytest.raises(UserError, match="num_workers"):
        list(parallel.parallel_map(die, [(0,), (1,)], num_workers=2))


def test_a_worker_ends_with_its_parent(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    parents = iter([7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    parallel._end_with(7)
    assert ended == [1]
