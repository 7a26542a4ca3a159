"""Domain weights of documents: a distribution, where the documents' topic is, with its doubts."""

import itertools
import json

import conftest
import numpy as np
import pytest
from conftest import tiny_config, topic_text

from soup_jax.data.corpus import Corpus, open_corpus
from soup_jax.data.domain_histogram import DocumentHistogram, document_histogram
from soup_jax.data.prepare.stages import prepare
from soup_jax.data.readers import text_hash
from soup_jax.data.sources import split_of
from soup_jax.errors import UserError


@pytest.fixture(scope="module")
def corpus(tiny_corpus: str) -> Corpus:
    return open_corpus(tiny_corpus)


def _texts(topic: str, num: int = 20) -> list[str]:
    return [topic_text(topic, 5000 + i) for i in range(num)]


@pytest.fixture(scope="module")
def by_topic(corpus: Corpus) -> dict[str, DocumentHistogram]:
    return {topic: document_histogram(corpus, _texts(topic)) for topic in conftest.TOPICS}


def _num_tokens(corpus: Corpus, texts: list[str]) -> int:
    return sum(len(ids) + 1 for ids in corpus.tokenizer().encode_batch(texts))


def test_h_is_a_distribution_in_steps_of_one_token(corpus, by_topic):
    for topic, found in by_topic.items():
        assert found.num_documents == 20
        assert found.h_K.shape == (6,)
        assert found.h_K.dtype == np.float64
        np.testing.assert_allclose(found.h_K.sum(), 1, rtol=1e-12)
        counts = found.h_K * _num_tokens(corpus, _texts(topic))
        np.testing.assert_allclose(counts, counts.round(), atol=1e-9)
        assert (counts >= 0).all()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> tuple[Corpus, list[str]]:
    """A corpus of short sailing, long cooking, python cut into pieces; its training documents."""
    folder = tmp_path_factory.mktemp("uneven")
    lengths = {"sailing": 20, "cooking": 200, "python": 700}
    texts = [topic_text(t, i, num_words=n) for i in range(30) for t, n in lengths.items()]
    texts += ["", "7"]  # the embedder knows neither
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    fields = {"corpus.dir": str(folder / "corpus"), "corpus.sources": (str(path),)}
    fields |= {"corpus.max_chars": 2000, "seq_len": 8, "num_domains": 3}
    made = prepare(tiny_config(**fields))
    return made, [t for t in texts if t and split_of(text_hash(t), 0.1, 0) == "train"]


def test_all_training_documents_have_the_frequencies_of_the_corpus(uneven):
    corpus, texts = uneven
    found = document_histogram(corpus, texts)
    assert found.num_documents == len(texts)
    windows, pad = np.diff(corpus.offsets["train"]), corpus.pad["train"]
    assert _num_tokens(corpus, texts) > 0.9 * corpus.seq_len * windows.sum()
    # What the docstring promises; counted by document the distance is 0.5.
    distance = np.abs(found.h_K - corpus.domain_frequencies).sum() / 2
    bound = found.unknown + pad.sum() / (windows.sum() * corpus.seq_len)
    assert distance <= bound < 0.002
    assert 0.6 < found.h_K.max() < 0.8


def test_a_long_document_votes_with_all_of_its_pieces(uneven):
    corpus, _ = uneven
    begin, end = (topic_text(t, 1, num_words=900)[:4000] for t in ("python", "sailing"))
    found = document_histogram(corpus, [begin + end])
    assert (found.num_documents, found.largest) == (1, pytest.approx(1))
    parts = [document_histogram(corpus, [text]) for text in (begin, end)]
    weights = [_num_tokens(corpus, [t[:2000], t[2000:]]) for t in (begin, end)]
    expected = np.average([part.h_K for part in parts], axis=0, weights=weights)
    np.testing.assert_allclose(found.h_K, expected, atol=1e-12)
    assert np.count_nonzero(found.h_K) == 2


def test_one_document_with_most_of_the_weight_warns(uneven):
    corpus, _ = uneven
    short = [topic_text("sailing", i, num_words=15) for i in range(12)]
    found = document_histogram(corpus, [*short, topic_text("python", 1, num_words=600)])
    assert 0.5 < found.largest < 0.7
    assert [f"one document has {found.largest:.0%}" in w for w in found.warnings()] == [True]
    assert not document_histogram(corpus, short).warnings()


def test_topics_go_to_domains_of_their_own(by_topic):
    for a, b in itertools.combinations(by_topic.values(), 2):
        assert np.minimum(a.h_K, b.h_K).sum() < 0.1


def test_labels_of_the_nearest_domains_are_words_of_the_topic(corpus, by_topic):
    for topic, found in by_topic.items():
        label, weight = found.nearest(corpus, num=1)[0]
        assert weight == found.h_K.max()
        words = set(conftest.TOPICS[topic].split())
        others = {w for t, ws in conftest.TOPICS.items() if t != topic for w in ws.split()}
        assert any(w in label for w in words - others), (topic, label)


def test_nearest_is_heaviest_first_without_empty_domains(corpus):
    found = DocumentHistogram(np.array([0.0, 0.25, 0.5, 0.0, 0.0, 0.25]), 4, 0.0)
    expected = [(corpus.label(k), w) for k, w in ((2, 0.5), (1, 0.25), (5, 0.25))]
    assert found.nearest(corpus) == expected
    assert found.nearest(corpus, num=1) == expected[:1]


def test_histogram_of_a_union_is_the_average_by_tokens(corpus, by_topic):
    topics = ("cooking", "python")
    both = document_histogram(corpus, [text for topic in topics for text in _texts(topic)])
    weights = [_num_tokens(corpus, _texts(topic)) for topic in topics]
    expected = np.average([by_topic[topic].h_K for topic in topics], axis=0, weights=weights)
    np.testing.assert_allclose(both.h_K, expected, atol=1e-12)


def test_order_of_the_documents_does_not_matter(corpus, by_topic):
    reverse = document_histogram(corpus, _texts("sailing")[::-1])
    np.testing.assert_allclose(reverse.h_K, by_topic["sailing"].h_K, rtol=1e-12)


def test_text_of_the_corpus_has_no_warning(by_topic):
    for found in by_topic.values():
        assert found.outside < 0.5
        assert found.warnings() == []


def test_garbage_resembles_no_domain(corpus):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("qxzjvQXZ~^|"), 300)) for _ in range(12)]
    found = document_histogram(corpus, texts)
    np.testing.assert_allclose(found.h_K.sum(), 1)
    assert found.outside == 1
    assert len(found.warnings()) == 1
    assert "resemble" in found.warnings()[0]


@pytest.mark.parametrize("text", ["\U0001f35e" * 40, "x", "\u0915\u0916 " * 9, "1 2 3"])
def test_a_document_without_a_known_word_counts_as_the_corpus_does(corpus, text):
    found = document_histogram(corpus, [text])
    np.testing.assert_allclose(found.h_K, corpus.domain_frequencies)
    assert (found.num_unknown, found.outside, found.unknown) == (1, 1, 1)
    assert "1 of 1 documents resemble no domain" in " ".join(found.warnings())


def test_documents_without_a_known_word_leave_the_others_where_they_are(corpus, by_topic):
    found = document_histogram(corpus, [*_texts("sailing"), *["x"] * 5])
    known, unknown = (_num_tokens(corpus, texts) for texts in (_texts("sailing"), ["x"] * 5))
    assert found.unknown == pytest.approx(unknown / (known + unknown))
    parts = (by_topic["sailing"].h_K, corpus.domain_frequencies)
    expected = np.average(parts, axis=0, weights=(known, unknown))
    np.testing.assert_allclose(found.h_K, expected, atol=1e-12)
    assert [w for w in found.warnings() if "5 of 25 documents" in w] == found.warnings()


@pytest.mark.parametrize(("num", "warned"), [(1, True), (9, True), (10, False)])
def test_few_documents_warn(corpus, num, warned):
    found = document_histogram(corpus, _texts("cooking", num))
    assert [f"only {num} documents" in w for w in found.warnings()] == [True] * warned


def test_no_documents_are_refused(corpus):
    with pytest.raises(UserError, match="no documents"):
        document_histogram(corpus, [])
