"""What `prepare` leaves out: near duplicates and documents of an evaluation."""

import itertools
import json
import pathlib

import numpy as np
import pytest
from conftest import TOPICS, tiny_config, topic_text

from soup_jax.cli import main as cli
from soup_jax.data.prepare import clean, contamination, ngrams, shards, stages
from soup_jax.data.readers import text_hash
from soup_jax.errors import UserError


def words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def grams(text: str, size: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + size]) for i in range(max(len(found) - size + 1, 1))}


def counts_of(texts: list[str], size: int) -> list[int]:
    _, ends = ngrams.ngrams(texts, size)
    return np.diff(ends, prepend=0).tolist()


def sets_of(texts: list[str], size: int) -> list[set[int]]:
    hashes, ends = ngrams.ngrams(texts, size)
    return [set(part.tolist()) for part in np.split(hashes, ends)[:-1]]


def edited(text: str, every: int) -> str:
    found = text.split()
    return " ".join(f"new{i}" if i % every == every - 1 else w for i, w in enumerate(found))


@pytest.mark.parametrize("size", [1, 5, 8])
def test_ngrams_are_those_of_words(size, monkeypatch):
    monkeypatch.setattr(ngrams, "_PIECE_BYTES", 4000)  # several pieces
    rng = np.random.default_rng(0)
    vocabulary = ["a", "b", "ab", "wörter", "Größe", "ß", "x1", "the", "0", "00"]
    texts = [" ".join(rng.choice(vocabulary, rng.integers(1, 60))) for _ in range(200)]
    texts += ["", "...", "one two", "One, TWO!"]
    assert counts_of(texts, size) == [len(grams(t, size)) if words(t) else 0 for t in texts]
    found = sets_of(texts, size)
    for i, j in itertools.combinations(range(0, 204, 7), 2):
        expected = len(grams(texts[i], size) & grams(texts[j], size))
        assert len(found[i] & found[j]) == expected
    assert found[-1] == found[-2]  # case and punctuation are nothing
    assert sets_of(texts[3:4], size)[0] == found[3]  # whatever lies beside it


def test_ideographs_are_words():
    assert counts_of(["日本語の本", "中文 中文", "ab中cd"], 1) == [4, 2, 2]  # a word of each, once
    assert counts_of(["日本語の本を読む"], 5) == [4]


def test_typographic_forms_make_no_difference():
    plain = "He said \"that's - well - not 1st\" and left, didn't he? (naïve) fine"
    typeset = "He said “that’s – well — not 1st” and left, didn’t he? (naïve) ﬁne"
    other_spaces = plain.replace(" ", "\u00a0")
    for size in (1, 5, 8):
        first, *others = sets_of([plain, typeset, other_spaces], size)
        assert len(first) > 3
        assert all(other == first for other in others)
    assert sets_of(["你好，世界"], 2) == sets_of(["你好 世界"], 2)


def test_signatures_estimate_the_jaccard_similarity():
    rng = np.random.default_rng(1)
    vocabulary = [f"w{i}" for i in range(3000)]
    for every in (20, 50, 200):
        texts = [" ".join(rng.choice(vocabulary, 400)) for _ in range(40)]
        others = [edited(text, every) for text in texts]
        exact = [
            len(grams(a, 5) & grams(b, 5)) / len(grams(a, 5) | grams(b, 5))
            for a, b in zip(texts, others)
        ]
        found = ngrams.similarity(ngrams.signatures(texts, 5), ngrams.signatures(others, 5))
        assert abs(found.mean() - np.mean(exact)) < 0.02
        assert np.abs(found - exact).max() < 0.2  # 112 functions: a standard error of 0.05
    far = ngrams.similarity(ngrams.signatures(texts, 5), ngrams.signatures(texts[::-1], 5))
    assert far.max() < 0.05


def signed(tmp_path, texts: list[str], size: int = 7) -> list:
    """Signed shards of `size` documents each."""
    paths = []
    for number, start in enumerate(range(0, len(texts), size)):
        part = [text.encode() for text in texts[start : start + size]]
        tensors = {
            "text": np.frombuffer(b"".join(part), np.uint8),
            "offsets": np.cumsum([0, *map(len, part)]).astype(np.int64),
            "hash": np.stack([np.frombuffer(text_hash(t.decode()), np.uint8) for t in part]),
            "split": np.zeros(len(part), np.uint8),
            "piece": np.zeros(len(part), np.uint32),
        }
        shards.save(tmp_path / f"{number}.safetensors", tensors)
        paths.append(tmp_path / f"{number}.signed")
        clean.sign_shard(tmp_path / f"{number}.safetensors", paths[-1], None, near=True)
    return paths


def test_groups_of_near_duplicates_across_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(clean, "_PAIRS", 5)
    rng = np.random.default_rng(2)
    vocabulary = [f"w{i}" for i in range(3000)]
    texts = [" ".join(rng.choice(vocabulary, 300)) for _ in range(30)]
    texts[13], texts[29] = edited(texts[4], 150), texts[4].upper() + "!"
    texts[20] = edited(texts[19], 100)
    texts[25] = edited(texts[3], 6)  # far
    texts[7], texts[8] = "?!", "!?"  # without words: like nothing
    paths = signed(tmp_path, texts)
    first = clean.near_duplicates(paths, np.ones(30, bool), 0.8)
    expected = np.arange(30)
    expected[[13, 29]], expected[20] = 4, 19
    np.testing.assert_array_equal(first, expected)
    # Who is not looked at is nobody's duplicate, and has none.
    among = np.ones(30, bool)
    among[4] = False
    expected[13], expected[29] = 13, 13
    np.testing.assert_array_equal(clean.near_duplicates(paths, among, 0.8), expected)
    none = clean.near_duplicates(paths, np.zeros(30, bool), 0.8)
    np.testing.assert_array_equal(none, np.arange(30))


def test_contamination_is_containment_either_way(tmp_path):
    rng = np.random.default_rng(3)
    vocabulary = [f"w{i}" for i in range(3000)]
    tests = [" ".join(rng.choice(vocabulary, 80)) for _ in range(4)]
    others = [" ".join(rng.choice(vocabulary, 900)) for _ in range(4)]
    (tmp_path / "tests.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in tests))
    cfg = tiny_config(**{"corpus.evaluation": (str(tmp_path / "tests.jsonl"),)})
    contamination.write_index(tmp_path / "evaluation.safetensors", cfg.corpus)
    evaluation = shards.load(tmp_path / "evaluation.safetensors")
    texts = [
        others[0],
        f"{others[1]} {tests[2].upper()} {others[1]}",  # quoted
        edited(f"{others[2]} {tests[1]}", 30),  # and changed
        " ".join(tests[3].split()[10:50]),  # a part of one
        " ".join(tests[0].split()[:30]) + others[3],  # the lesser part
        "",
    ]
    owner, share = contamination.overlaps(texts, evaluation)
    assert owner.tolist() == [-1, 2, 1, 3, -1, -1]
    assert share[1] == share[3] == 1
    assert 0.7 <= share[2] < 1
    assert share[0] == share[4] == share[5] == 0
    assert contamination.overlaps([], evaluation)[0].tolist() == []


def test_contamination_in_documents_of_one_form_is_the_exact_share(monkeypatch):
    monkeypatch.setattr(contamination, "_OWNERS", 3)
    rng = np.random.default_rng(5)
    vocabulary = [f"w{i}" for i in range(3000)]
    form = list(rng.choice(vocabulary, 60))

    def filled(number: int) -> str:
        return " ".join([*form[:30], *rng.choice(vocabulary, number), *form[30:]])

    tests = [filled(number) for number in (0, 0, 0, 0, 0, *[5] * 8, *[40] * 8)]
    texts = [tests[3], tests[12], edited(tests[20], 40), filled(40), filled(200), tests[8][:200]]
    owner, share = contamination.overlaps(texts, contamination.index(tests))
    size = contamination.OVERLAP_WORDS
    for i, text in enumerate(texts):
        own = grams(text, size)
        exact = [len(own & grams(t, size)) / min(len(own), len(grams(t, size))) for t in tests]
        assert (owner[i] >= 0) == (max(exact) >= contamination.OVERLAP), i
        if owner[i] >= 0:
            assert share[i] == pytest.approx(exact[owner[i]])
    assert share[0] == share[1] == 1
    assert owner[2] == 20
    assert owner[3] in (0, 1, 2)  # the form by itself is in it


def test_copies_of_documents_without_words_are_contaminated(tmp_path):
    (tmp_path / "tests.jsonl").write_text('{"text": "?! ..."}\n')
    cfg = tiny_config(**{"corpus.evaluation": (str(tmp_path / "tests.jsonl"),)})
    contamination.write_index(tmp_path / "index", cfg.corpus)
    texts = ["!!", "?! ..."]
    hashes = np.stack([np.frombuffer(text_hash(text), np.uint8) for text in texts])
    found = contamination.owners(texts, hashes, tmp_path / "index")
    assert found["owner"].tolist() == [-1, 0]
    assert found["share"].tolist() == [0, 1]


def config(folder, **changes):
    fields = {
        "corpus.sources": (str(folder / "text.jsonl"),),
        "corpus.dir": str(folder / "corpus"),
        "corpus.near_duplicates": 0.8,
        "corpus.evaluation": (str(folder / "tests.jsonl"),),
    }
    return tiny_config(**fields | changes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_DOCUMENTS", 25)
    texts = [topic_text(topic, seed) for seed in range(30) for topic in TOPICS]
    tests = [topic_text("sailing", 100 + seed) for seed in range(5)]
    planted = [edited(text, 60) for text in texts[:6]]
    planted += [f"As it says: {text.upper()}" for text in tests[:3]]
    for name, documents in (("text", [*texts, *planted]), ("tests", tests)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return tmp_path


def all_texts(corpus) -> set[str]:
    found, tokenizer = set(), corpus.tokenizer()
    for split in corpus.offsets:
        ids = np.arange(corpus.offsets[split][-1])
        rows = corpus.read_windows(split, ids)[:, 1:]
        for k in range(corpus.num_domains):
            own = rows[corpus.offsets[split][k] : corpus.offsets[split][k + 1]].ravel().tolist()
            for eos, part in itertools.groupby(own, key=lambda t: t == corpus.eos_id):
                if not eos:
                    found.add(tokenizer.decode(list(part)))
    return found


def test_prepare_leaves_out_what_was_planted_and_tells(folder, capsys):
    corpus = stages.prepare(config(folder))
    assert "6 near duplicates, 3 in corpus.evaluation" in capsys.readouterr().out
    assert corpus.manifest["counts"]["near_duplicates"] == 6
    lines = [json.loads(x)["text"] for x in (folder / "text.jsonl").read_text().splitlines()]
    assert all_texts(corpus) == set(lines[:-9])
    told = json.loads((corpus.path / "dropped.json").read_text())
    near, contaminated = told["near_duplicates"], told["contaminated"]
    assert (near["found"], contaminated["found"], contaminated["dropped"]) == (6, 3, True)
    assert [e["text"] for e in near["examples"]] == [t[:300] for t in lines[-9:-3]]
    assert [e["kept"] for e in near["examples"]] == [t[:300] for t in lines[:6]]
    assert all(e["similarity"] >= 0.8 for e in near["examples"])
    where = [e["evaluation"] for e in contaminated["examples"]]
    assert where == [f"{folder / 'tests.jsonl'}:{line}" for line in (1, 2, 3)]
    corpus.verify()
    assert stages.prepare(config(folder)).fingerprint == corpus.fingerprint
    # Another evaluation makes another corpus.
    with (folder / "tests.jsonl").open("a") as f:
        f.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"was prepared from other settings or sources .evaluation"):
        stages.prepare(config(folder))
    changed = {"corpus.near_duplicates": 0.0, "corpus.evaluation": ()}
    with pytest.raises(UserError, match=r"corpus.near_duplicates: 0.8, now 0.0"):
        stages.prepare(config(folder, **changed))


@pytest.mark.parametrize("max_chars", [100, 170])
def test_documents_that_are_cut_into_pieces_are_compared_whole(folder, max_chars, capsys):
    lines = [json.loads(x)["text"] for x in (folder / "text.jsonl").read_text().splitlines()]
    planted = [f"{'Once more. ' * (2 + i)}{text}" for i, text in enumerate(lines[:6])]
    texts = [*lines[:-9], *planted, *lines[-3:]]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    corpus = stages.prepare(config(folder, **{"corpus.max_chars": max_chars}))
    assert "6 near duplicates, 3 in corpus.evaluation" in capsys.readouterr().out
    pieces = {t[i : i + max_chars] for t in texts[:-9] for i in range(0, len(t), max_chars)}
    assert all_texts(corpus) == pieces
    told = json.loads((corpus.path / "dropped.json").read_text())
    assert [e["hash"] for e in told["near_duplicates"]["examples"]] == [
        text_hash(text).hex() for text in planted
    ]


def test_an_evaluation_that_is_not_read_is_refused(folder):
    text = (folder / "tests.jsonl").read_text()
    (folder / "tests.jsonl").write_text(text.replace('"text"', '"question"'))
    with pytest.raises(UserError, match=r"0 documents .*evaluation_text_field=question"):
        stages.prepare(config(folder))
    corpus = stages.prepare(config(folder, **{"corpus.evaluation_text_field": "question"}))
    assert corpus.manifest["counts"]["contaminated"] == 3


def test_contamination_may_be_told_only(folder):
    cfg = config(folder, **{"corpus.contaminated": "report", "corpus.near_duplicates": 0.0})
    corpus = stages.prepare(cfg)
    assert len(all_texts(corpus)) == 4 * 30 + 9
    told = json.loads((corpus.path / "dropped.json").read_text())
    assert told["contaminated"]["found"] == 3
    assert not told["contaminated"]["dropped"]
    assert "near_duplicates" not in told


@pytest.mark.parametrize("stage", ["sign_shard", "_choose", "keep_shard"])
def test_a_kill_while_it_cleans_changes_nothing(folder, stage, monkeypatch):
    whole = stages.prepare(config(folder, **{"corpus.dir": str(folder / "whole")}))
    original, calls = getattr(clean, stage), []

    def dies(*args):
        calls.append(1)
        if len(calls) == min(2, 4 if stage != "_choose" else 1):
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(clean, stage, dies)
        with pytest.raises(KeyboardInterrupt):
            stages.prepare(config(folder))
    again = stages.prepare(config(folder))
    assert again.fingerprint == whole.fingerprint
    one, other = ((c.path / "dropped.json").read_bytes() for c in (whole, again))
    assert one == other


@pytest.mark.parametrize("max_chars", [1_000_000, 120])
def test_the_self_test_finds_what_it_plants_in_real_text(folder, capsys, max_chars):
    arguments = [
        f"--config={pathlib.Path(__file__).parents[1]}/experiments/base.py",
        f"--config.corpus.sources={folder / 'text.jsonl'}",
        "--self_test",
        f"--config.corpus.max_chars={max_chars}",
    ]
    assert cli.run(["prepare", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "near duplicates: 43 of 43 planted were found" in printed
    assert "contaminated: 43 of 43 planted were found" in printed
    assert not (folder / "corpus").exists()
    arguments[1] = f"--config.corpus.sources={folder / 'tests.jsonl'}"
    assert cli.run(["prepare", *arguments]) == 2
    assert "needs 30 documents" in capsys.readouterr().err
