"""Held-out losses: what is scored, how it is averaged, and the shape of the result."""

import dataclasses
import gc
import json
import math
import pathlib
import shutil
import weakref

import conftest
import jax
import numpy as np
import pytest
from conftest import tiny_config

from soup_jax import soup
from soup_jax.data.corpus import Corpus
from soup_jax.data.readers import Document, text_hash
from soup_jax.data.sources import split_of
from soup_jax.errors import UserError
from soup_jax.evaluation import evaluator as evaluator_lib
from soup_jax.evaluation import sample as sample_lib
from soup_jax.evaluation import sets, table
from soup_jax.evaluation.sample import read_sample
from soup_jax.soup import merge
from soup_jax.specialists import compare
from soup_jax.specialists import open as open_lib
from soup_jax.specialists.compare import evaluate_runs

COLUMNS = ("specialist", "generic_h", "shared")


@pytest.fixture(scope="module")
def corpus(trained) -> Corpus:
    return trained.corpus


@pytest.fixture(scope="module")
def evaluator(trained) -> evaluator_lib.Evaluator:
    return make_evaluator(trained, batch_size=8)


def make_evaluator(trained, *, batch_size: int) -> evaluator_lib.Evaluator:
    config = trained.config
    return evaluator_lib.Evaluator(config, trained.model, trained.mesh, batch_size=batch_size)


@pytest.fixture(scope="module")
def cooking(tiny_text, trained) -> sets.SpecialistSet:
    path = str(tiny_text / "cooking.jsonl")
    return sets.specialist_set("cooking", path, trained.corpus, trained.cfg)


def _documents(text: pathlib.Path) -> list[Document]:
    return read_sample([str(text / "cooking.jsonl")], text_field="text").documents


def test_documents_are_split_by_hash_into_three_parts(tiny_text, trained, monkeypatch):
    seen = {}
    whole = sets.document_histogram, sets.pack

    def histogram(corpus, texts):
        seen["h"] = list(texts)
        return whole[0](corpus, texts)

    def pack(corpus, texts, **kwargs):
        seen["scored"] = list(texts)
        return whole[1](corpus, texts, **kwargs)

    monkeypatch.setattr(sets, "document_histogram", histogram)
    monkeypatch.setattr(sets, "pack", pack)
    path = str(tiny_text / "cooking.jsonl")
    found = sets.specialist_set("cooking", path, trained.corpus, trained.cfg)
    texts = {d.text: sets.part_fraction(d.hash) for d in _documents(tiny_text)}
    assert len(texts) == 30
    assert set(seen["h"]) == {t for t, fraction in texts.items() if fraction < 0.5}
    assert found.histogram.num_documents == len(seen["h"])
    final = seen["scored"]
    assert set(final) == {t for t, fraction in texts.items() if fraction >= 0.7}
    sets.specialist_set("cooking", path, trained.corpus, trained.cfg, part="tuning")
    # All documents, and none in two parts.
    assert sorted(seen["h"] + seen["scored"] + final) == sorted(texts)
    cfg = trained.cfg.copy_and_resolve_references()
    with cfg.unlocked():
        cfg.evaluate.tuning_fraction = 0.0
    for part in sets.PARTS:
        sets.specialist_set("cooking", path, trained.corpus, cfg, part=part)
        assert sorted(seen["h"] + seen["scored"]) == sorted(texts)


def _pack(corpus, texts, max_windows=0):
    settings = {"eos_id": corpus.eos_id, "seq_len": corpus.seq_len}
    return sets.pack(corpus.tokenizer(), texts, max_windows=max_windows, **settings)


def test_every_token_is_scored_once(corpus):
    texts = [conftest.topic_text("sailing", i, num_words=5 + 3 * i) for i in range(9)]
    packed = _pack(corpus, texts)
    tokenizer = corpus.tokenizer()
    stream = []
    for text in texts:
        stream += [*tokenizer.encode(text), corpus.eos_id]
    pairs = list(zip(packed.tokens, packed.num_targets))
    assert np.concatenate([row[1 : 1 + n] for row, n in pairs]).tolist() == stream
    # Each window's first input is the target before it: nothing is predicted from a gap.
    assert packed.tokens[0, 0] == corpus.eos_id
    np.testing.assert_array_equal(packed.tokens[1:, 0], packed.tokens[:-1, -1])
    assert packed.tokens.shape == (math.ceil(len(stream) / 32), 33)
    assert (packed.num_targets[:-1] == 32).all()
    assert packed.num_targets.sum() == len(stream)
    assert (packed.tokens[-1, packed.num_targets[-1] + 1 :] == corpus.eos_id).all()


@pytest.mark.parametrize("num_targets", [31, 32, 33, 64])
def test_windows_at_the_edges_of_the_length(corpus, num_targets):
    letter = next(c for c in "qzjxv" if len(corpus.tokenizer().encode(c * 40)) == 40)
    packed = _pack(corpus, [letter * (num_targets - 1)])
    assert len(packed.tokens) == math.ceil(num_targets / 32)
    assert packed.num_targets.sum() == num_targets
    assert (packed.num_targets > 0).all()


@pytest.mark.parametrize(
    "texts",
    [
        ["butter flour oven bake " * 40, "wind " * 7],
        ["caf\u00e9 na\u00efve"],
        ["\u65e5\u672c\u8a9e", "\U0001f35e"],
        ["written <|endoftext|> in a text"],
    ],
)
def test_bytes_are_those_of_the_texts(corpus, texts):
    packed = _pack(corpus, texts)
    assert packed.num_bytes == sum(len(t.encode()) for t in texts)


def test_bytes_of_characters_cut_by_windows(corpus):
    text = "\u65e5\u672c\u8a9e\u3067\u3059" * 60
    packed = _pack(corpus, [text])
    assert len(packed.tokens) > 10
    assert packed.num_bytes == len(text.encode())


def test_limit_keeps_windows_spread_over_the_set(corpus):
    texts = [conftest.topic_text("algebra", i) for i in range(8)]
    whole = _pack(corpus, texts)
    part = _pack(corpus, texts, 4)
    kept = (np.arange(4) * len(whole.tokens)) // 4
    np.testing.assert_array_equal(part.tokens, whole.tokens[kept])
    np.testing.assert_array_equal(part.num_targets, whole.num_targets[kept])
    assert part.num_bytes < whole.num_bytes


def _direct(model, theta, scored: sets.TokenSet) -> float:
    theta = jax.device_get(theta)
    total = weight = 0.0
    for tokens, n in zip(scored.tokens, scored.num_targets):
        batch = {"tokens": tokens[None], "num_targets": np.asarray([n], np.int32)}
        losses, weights = jax.device_get(model.example_losses(theta, batch))
        assert weights.sum() == n
        total += float((losses * weights).sum())
        weight += n
    return total / weight


def test_loss_is_that_of_the_merged_network_window_by_window(trained, evaluator, cooking):
    made = evaluator.at(trained.params, cooking.histogram.h_K)
    found = evaluator.loss(made, cooking.scored)
    params = jax.device_get(trained.params)
    theta, _ = soup.specialist(
        params, np.asarray(cooking.histogram.h_K, np.float32), trained.config
    )
    np.testing.assert_allclose(
        found["loss"], _direct(trained.model, theta, cooking.scored), rtol=1e-5
    )
    nats = found["loss"] * cooking.scored.num_targets.sum()
    expected = nats / math.log(2) / cooking.scored.num_bytes
    np.testing.assert_allclose(found["bits_per_byte"], expected, rtol=1e-6)


def test_batch_size_and_padding_do_not_change_the_loss(trained, cooking):
    losses = []
    for size in (3, 8, 24):
        scorer = make_evaluator(trained, batch_size=size)
        part = sets.TokenSet(cooking.scored.tokens[:7], cooking.scored.num_targets[:7], 100)
        losses.append(scorer.loss(scorer.shared(trained.params), part)["loss"])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_a_batch_is_no_larger_than_what_is_scored(trained, evaluator, cooking):
    scorer = evaluator_lib.Evaluator(
        trained.config,
        trained.model,
        trained.mesh,
        batch_size=1 << 40,  # of padding, if it were made
        sets=[None, cooking.scored],
    )
    theta = scorer.shared(trained.params)
    assert scorer.loss(theta, cooking.scored) == evaluator.loss(theta, cooking.scored)


def test_nothing_to_score_is_refused(trained, evaluator):
    empty = sets.TokenSet(np.zeros((0, 33), np.int32), np.zeros(0, np.int32), 0)
    with pytest.raises(UserError, match="no tokens to score"):
        evaluator.loss(evaluator.shared(trained.params), empty)


@pytest.fixture(scope="module")
def evaluated(tiny_run, generic_run):
    """(result, table) of the soup against the generic run."""
    result = evaluate_runs(tiny_run, against=[generic_run])
    return result, table.table(result)


def test_result_has_the_documented_shape(evaluated, cooking):
    result, _ = evaluated
    assert set(result) == {"specialists", "average", "generic_validation", "part", "runs"}
    assert set(result["specialists"]) == {"cooking", "python"}
    columns = {*COLUMNS, "generic"}
    for row in result["specialists"].values():
        counts = {"tokens", "bytes", "documents_in_training"}
        assert set(row) == {*counts, "alpha", "h", *columns}
        assert all(set(row[c]) == {"loss", "bits_per_byte"} for c in columns)
    assert set(result["average"]) == columns
    assert set(result["generic_validation"]) == columns - {"specialist"}
    row = result["specialists"]["cooking"]
    assert row["tokens"] == cooking.scored.num_targets.sum()
    assert row["bytes"] == cooking.scored.num_bytes
    assert set(result["runs"]) == {"specialist", "generic"}


def test_result_has_the_coefficients_and_domain_weights_that_were_scored(
    evaluated, trained, cooking
):
    row = json.loads(json.dumps(evaluated[0]["specialists"]["cooking"]))
    h_K = np.zeros(trained.num_domains)
    for domain, weight in row["h"].items():
        h_K[int(domain)] = weight
    np.testing.assert_array_equal(h_K, cooking.histogram.h_K)
    np.testing.assert_allclose(row["alpha"], trained.at(h_K).alpha_E, rtol=1e-5)


def test_average_is_the_mean_over_specialists(evaluated):
    result, _ = evaluated
    for column, value in result["average"].items():
        for metric, number in value.items():
            rows = [row[column][metric] for row in result["specialists"].values()]
            np.testing.assert_allclose(number, np.mean(rows), rtol=1e-12)


def test_shared_is_the_merge_at_alpha_zero(evaluated, trained, cooking):
    params = jax.device_get(trained.params)
    theta = merge.merge(params["shared"], params["bank"], np.zeros(4, np.float32))
    found = evaluated[0]["specialists"]["cooking"]["shared"]["loss"]
    np.testing.assert_allclose(found, _direct(trained.model, theta, cooking.scored), rtol=1e-5)


def test_column_of_another_run_is_its_own_model(evaluated, generic_run, cooking):
    other = open_lib.load(generic_run)
    direct = _direct(other.model, other.params["shared"], cooking.scored)
    found = evaluated[0]["specialists"]["cooking"]["generic"]["loss"]
    np.testing.assert_allclose(found, direct, rtol=1e-5)


def test_training_scores_the_tuning_part(tiny_run):
    from soup_jax.training import metrics

    evaluated = evaluate_runs(tiny_run, part="tuning")
    assert evaluated["part"] == "tuning"

    last = metrics.read_metrics(tiny_run / "metrics.jsonl", kind="evaluation")[-1]
    for name, row in last["specialists"].items():
        for column in COLUMNS:
            found = evaluated["specialists"][name][column]["loss"]
            np.testing.assert_allclose(found, row[column]["loss"], rtol=1e-5)


def test_table_stars_the_best_of_each_line():
    def row(*losses: float) -> dict:
        return {c: {"loss": x, "bits_per_byte": -x} for c, x in zip(COLUMNS, losses)}

    result = {
        "specialists": {"a": row(1.0, 2.0, 3.0), "b": row(3.0, 1.5, 2.0)},
        "average": row(2.0, 1.75, 2.5),
        "generic_validation": {k: v for k, v in row(0, 5.0, 4.0).items() if k != "specialist"},
    }
    cells = {}
    for line in table.table(result).splitlines():
        name = line[: len("generic validation")].strip()
        cells[name] = line[len("generic validation") :].split()
    assert cells["a"] == ["1.0000*", "2.0000", "3.0000"]
    assert cells["b"] == ["3.0000", "1.5000*", "2.0000"]
    assert cells["average"] == ["2.0000", "1.7500*", "2.5000"]
    assert cells["generic validation"] == ["5.0000", "4.0000*"]
    assert "-3.0000*" in table.table(result, metric="bits_per_byte")


def test_table_of_an_evaluation_names_all_columns(evaluated):
    _, text = evaluated
    assert text.splitlines()[0].split() == [*COLUMNS, "generic"]


def test_what_is_equal_is_not_called_worse():
    equal, lower = {"loss": 2.0}, {"loss": 1.5}
    row = {"specialist": equal, "again": equal, "better": lower}
    said = table.verdict({"average": row, "specialists": {"a": row}}).splitlines()
    assert said[0].startswith("specialists are as good as again on average")
    assert said[1].startswith("specialists are 0.5000 nats WORSE than better on average")


def test_names_are_those_of_the_files(tiny_text):
    found = sets.document_sets([str(tiny_text / "c*.jsonl"), str(tiny_text / "python.jsonl")])
    assert found == {n: str(tiny_text / f"{n}.jsonl") for n in ("cooking", "python")}


def test_pattern_without_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no specialist file matches '.*jsonl'$"):
        sets.document_sets([str(tmp_path / "*.jsonl")])
    with pytest.raises(
        UserError, match=r"=\"\('a','b'\)\", and in `evaluate` a --specialists each"
    ):
        sets.document_sets(["a,b"])


def test_two_files_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "law.jsonl").write_text("{}")
    with pytest.raises(UserError, match="are named 'law'"):
        sets.document_sets([str(tmp_path / "*" / "law.jsonl")])


@pytest.mark.parametrize("num", [1, 2])
def test_too_few_documents_are_refused(tmp_path, tiny_text, trained, num):
    # All of one half, so that the other part stays empty.
    half = [d.text for d in _documents(tiny_text) if sets.part_fraction(d.hash) < 0.5]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in half[:num]))
    with pytest.raises(UserError, match=f"has {num} documents for h and 0 to score"):
        sets.specialist_set("few", str(path), trained.corpus, trained.cfg)


@pytest.fixture(scope="module")
def with_training_text(tmp_path_factory, tiny_text, corpus) -> tuple[str, int]:
    """30 documents of cooking and 40 of the corpus's text; how many of these it would score."""
    texts = [d.text for d in _documents(tiny_text)]
    generic = read_sample([str(tiny_text / "generic.jsonl")], text_field="text").documents[:40]
    path = tmp_path_factory.mktemp("known") / "cooking.jsonl"
    lines = [json.dumps({"text": t}) + "\n" for t in [*texts, *(d.text for d in generic)]]
    path.write_text("".join(lines))
    train = [d for d in generic if split_of(d.hash, 0.1, 0) == "train"]
    return str(path), sum(sets.part_fraction(d.hash) >= 0.7 for d in train)


def test_documents_in_the_training_text_are_not_scored(tiny_run, with_training_text, cooking):
    path, num_known = with_training_text
    assert num_known > 3
    result = evaluate_runs(tiny_run, specialists=[path])
    row = result["specialists"]["cooking"]
    assert row["documents_in_training"] == num_known
    # The corpus's validation documents among them are scored.
    tokens = cooking.scored.num_targets.sum()
    assert tokens <= row["tokens"] < 2 * tokens
    text = f"(documents in the training text are not scored: {num_known} of cooking)"
    assert table.table(result).endswith(text)
    assert cooking.num_in_training == 0


def test_training_text_alone_cannot_be_scored(tmp_path, tiny_text, trained):
    generic = read_sample([str(tiny_text / "generic.jsonl")], text_field="text").documents
    train = [d for d in generic if split_of(d.hash, 0.1, 0) == "train"]
    path = tmp_path / "known.jsonl"
    path.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in train))
    num = sum(sets.part_fraction(d.hash) >= 0.7 for d in train)
    message = rf"0 to score \(part 'final'\), and {num} in the training text"
    with pytest.raises(UserError, match=message):
        sets.specialist_set("known", str(path), trained.corpus, trained.cfg)
    # Of another run's corpus as well.
    other = dataclasses.replace(trained.corpus, manifest=trained.corpus.manifest | {"extras": {}})
    assert sets.specialist_set("known", str(path), other, trained.cfg).num_in_training is None
    with pytest.raises(UserError, match=message):
        sets.specialist_set("known", str(path), other, trained.cfg, others=[trained.corpus])


@pytest.mark.parametrize("content", [b"", b"not json\n", b'{"body": "x"}\n', b"\xff\xfe\n"])
def test_unreadable_documents_are_refused(tmp_path, trained, content):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds no readable document"):
        sets.specialist_set("broken", str(path), trained.corpus, trained.cfg)


def test_a_duplicate_counts_once(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text('{"text": "one"}\n{"text": "one"}\n{"text": "two"}\n')
    sample = read_sample([str(path)], text_field="text")
    assert [d.text for d in sample.documents] == ["one", "two"]
    assert (sample.num_duplicates, sample.damage) == (1, [])


def test_the_parts_of_a_specialist_are_none_of_the_corpus():
    # Documents of the corpus's own validation split, which are those of the lowest fractions.
    hashes = [text_hash(f"text number {i}") for i in range(20_000)]
    held = [h for h in hashes if split_of(h, 0.05, 0) == "validation"]
    places = np.array([sets.part_fraction(h) for h in held])
    assert abs(np.mean(places < 0.5) - 0.5) < 0.06
    assert abs(np.mean(places >= 0.7) - 0.3) < 0.06


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is nothing in it"),
        (b'{"body": "words"}\n', r"no field 'text'; .* `jq -c '{text: \.body}' FILE > NEW`"),
        ("words".encode("utf-16"), "iconv"),
    ],
)
def test_why_there_is_no_document(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"holds no readable document: .*{message}"):
        read_sample([str(tmp_path / "a.jsonl")], text_field="text")


def test_a_sample_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_lib, "MAX_SAMPLE_BYTES", 1 << 20)
    lines = [json.dumps({"text": f"{i} " + "x" * 1000}) + "\n" for i in range(1100)]
    (tmp_path / "a.jsonl").write_text("".join(lines[:1000] * 2))
    assert len(read_sample([str(tmp_path / "a.jsonl")], text_field="text").documents) == 1000
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match="more than 1 MB of text: a specialist needs a sample"):
        read_sample([str(tmp_path / "a.jsonl")], text_field="text")


def test_columns_of_one_name_and_no_specialists_are_refused(generic_run, tiny_text, tmp_path):
    (tmp_path / "shared").mkdir()
    with pytest.raises(UserError, match="--specialists"):
        evaluate_runs(generic_run)
    with pytest.raises(UserError, match="not all different"):
        evaluate_runs(
            generic_run,
            against=[tmp_path / "shared"],
            specialists=[str(tiny_text / "cooking.jsonl")],
        )


def test_corpus_without_validation_windows_is_refused(corpus):
    empty = {**corpus.offsets, "validation": np.zeros(7, np.int64)}
    with pytest.raises(UserError, match="no validation windows"):
        sets.validation_set(dataclasses.replace(corpus, offsets=empty), max_windows=8)


def test_validation_set_is_the_split(corpus):
    whole = sets.validation_set(corpus, max_windows=0)
    total = int(corpus.offsets["validation"][-1])
    assert len(whole.tokens) == total > 0
    assert whole.num_targets.sum() == total * 32 - int(np.sum(corpus.pad["validation"]))
    assert tiny_config().seq_len == whole.tokens.shape[1] - 1


def test_one_run_at_a_time_is_on_the_devices(tiny_run, tiny_text, tmp_path, monkeypatch):
    opened, load = [], compare.load

    def watched(*arguments, **settings):
        gc.collect()
        assert not [r for r in opened if r() is not None]
        soup = load(*arguments, **settings)
        opened.append(weakref.ref(soup))
        return soup

    monkeypatch.setattr(compare, "load", watched)
    copies = [tmp_path / name for name in ("a", "b")]
    for copy in copies:
        shutil.copytree(tiny_run, copy)
    documents = [str(tiny_text / "cooking.jsonl")]
    result = evaluate_runs(tiny_run, against=copies, specialists=documents, max_windows=1)
    assert len(opened) == 3
    assert result["average"]["a"] == result["average"]["b"] == result["average"]["specialist"]
