"""Domain weights of documents: a distribution, where the documents' topic is, with its doubts."""

import itertools

import conftest
import numpy as np
import pytest
from conftest import topic_text

from soup_jax.data.corpus import Corpus, open_corpus
from soup_jax.data.domain_histogram import DocumentHistogram, document_histogram
from soup_jax.errors import UserError


@pytest.fixture(scope="module")
def corpus(tiny_corpus: str) -> Corpus:
    return open_corpus(tiny_corpus)


def _texts(topic: str, num: int = 20) -> list[str]:
    return [topic_text(topic, 5000 + i) for i in range(num)]


@pytest.fixture(scope="module")
def by_topic(corpus: Corpus) -> dict[str, DocumentHistogram]:
    return {topic: document_histogram(corpus, _texts(topic)) for topic in conftest.TOPICS}


def test_h_is_a_distribution_in_steps_of_one_document(by_topic):
    for found in by_topic.values():
        assert found.num_documents == 20
        assert found.h_K.shape == (6,)
        assert found.h_K.dtype == np.float64
        np.testing.assert_allclose(found.h_K.sum(), 1, rtol=1e-12)
        counts = found.h_K * 20
        np.testing.assert_allclose(counts, counts.round(), atol=1e-9)
        assert (counts >= 0).all()


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


def test_histogram_of_a_union_is_the_average(corpus, by_topic):
    both = document_histogram(corpus, _texts("cooking") + _texts("python"))
    expected = (by_topic["cooking"].h_K + by_topic["python"].h_K) / 2
    np.testing.assert_allclose(both.h_K, expected, atol=1e-12)


def test_order_of_the_documents_does_not_matter(corpus, by_topic):
    reverse = document_histogram(corpus, _texts("sailing")[::-1])
    np.testing.assert_array_equal(reverse.h_K, by_topic["sailing"].h_K)


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
    assert "resemble no domain" in found.warnings()[0]


@pytest.mark.parametrize("text", ["\U0001f35e" * 40, "x", "\u0915\u0916 " * 9, "1 2 3"])
def test_a_document_without_a_known_word_counts_as_the_corpus_does(corpus, text):
    found = document_histogram(corpus, [text])
    np.testing.assert_allclose(found.h_K, corpus.domain_frequencies)
    assert (found.num_unknown, found.outside) == (1, 1)
    assert "1 of 1 documents resemble no domain" in " ".join(found.warnings())


def test_documents_without_a_known_word_leave_the_others_where_they_are(corpus, by_topic):
    found = document_histogram(corpus, [*_texts("sailing"), *["x"] * 5])
    expected = 0.8 * by_topic["sailing"].h_K + 0.2 * corpus.domain_frequencies
    np.testing.assert_allclose(found.h_K, expected, atol=1e-12)
    assert [w for w in found.warnings() if "5 of 25 documents" in w] == found.warnings()


@pytest.mark.parametrize(("num", "warned"), [(1, True), (9, True), (10, False)])
def test_few_documents_warn(corpus, num, warned):
    found = document_histogram(corpus, _texts("cooking", num))
    assert [f"only {num} documents" in w for w in found.warnings()] == [True] * warned


def test_no_documents_are_refused(corpus):
    with pytest.raises(UserError, match="no documents"):
        document_histogram(corpus, [])
