"""Sources whose records name their domains: a corpus of these domains, and what is refused."""

import json
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import tiny_config, topic_text

from soup_jax.cli import main as cli
from soup_jax.data import domain_histogram
from soup_jax.data.corpus import open_corpus
from soup_jax.data.damage import Report
from soup_jax.data.prepare import given, provenance, stages
from soup_jax.data.prepare.work import Part
from soup_jax.data.readers import SourceFile
from soup_jax.data.sources import find_files, read_documents
from soup_jax.errors import UserError

TOPICS = ("cooking", "sailing", "algebra", "python")


def records(number=60):
    # Names of which some would be others by k-means: one document in ten is of the next topic.
    return [
        {"text": topic_text(TOPICS[(t + (i % 10 == 9)) % 4], 4 * i + t), "cluster": t * 7}
        for i in range(number)
        for t in range(4)
    ]


def config(path, **changes):
    return tiny_config(
        **{
            "corpus.sources": (str(path / "text.jsonl"),),
            "corpus.dir": str(path / "corpus"),
            "corpus.domain_field": "cluster",
            "corpus.num_workers": 1,
            "corpus.validation_fraction": 0.2,
            "num_domains": 4,
            "embed.dim": 16,
        }
        | changes
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("given")
    write(path / "text.jsonl", records())
    stages.prepare(config(path))
    return path


def test_the_domains_are_those_of_the_records(folder):
    corpus = open_corpus(folder / "corpus")
    assert [entry["label"] for entry in corpus.domains] == ["0", "7", "14", "21"]  # by size
    assert sum(sum(entry["documents"].values()) for entry in corpus.domains) == 240
    assert {sum(entry["documents"].values()) for entry in corpus.domains} == {60}
    # A domain's centroid is the direction of the mean of its train documents: one in ten is another
    # topic's, and still a specialist's documents fall to the domain that has most of theirs.
    for t, topic in enumerate(TOPICS):
        h_K = domain_histogram.document_histogram(
            corpus, [topic_text(topic, seed) for seed in range(900, 910)]
        ).h_K
        assert h_K[t] == 1


def test_windows_hold_the_documents_that_name_their_domain(folder):
    corpus = open_corpus(folder / "corpus")
    tokenizer, offsets = corpus.tokenizer(), corpus.offsets["train"]
    number = 0
    for k in range(4):
        rows = corpus.read_windows("train", np.arange(offsets[k], offsets[k + 1]))
        text = tokenizer.decode(np.append(rows[:, :-1].ravel(), rows[-1, -1]).tolist())
        found = [row["cluster"] for row in records() if row["text"] in text]
        assert set(found) == {7 * k}
        number += len(found)
    assert number == sum(entry["documents"]["train"] for entry in corpus.domains)


def test_parquet_and_two_workers_give_the_same_corpus(folder, tmp_path):
    rows = records()
    table = pyarrow.table(
        {"cluster": [str(row["cluster"]) for row in rows], "text": [row["text"] for row in rows]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "text.parquet")
    made = stages.prepare(
        config(
            tmp_path,
            **{"corpus.sources": (str(tmp_path / "text.parquet"),), "corpus.num_workers": 2},
        )
    )
    assert made.fingerprint == open_corpus(folder / "corpus").fingerprint


def test_records_without_a_domain_are_reported_and_left_out(tmp_path, capsys):
    rows = records()
    rows[3]["cluster"] = None
    rows[4]["cluster"] = True
    del rows[5]["cluster"]
    rows[6]["cluster"] = "x" * 201
    rows[7]["cluster"] = "\ud800"
    rows[8]["cluster"] = 0.0  # as tools write integers where some are missing
    write(tmp_path / "text.jsonl", rows)
    corpus = stages.prepare(config(tmp_path))
    assert sum(sum(entry["documents"].values()) for entry in corpus.domains) == 235
    said = capsys.readouterr()
    assert "5 records that name no domain" in said.out + said.err
    assert "text.jsonl:4" in said.out + said.err
    assert "are nearest to the centroid of the domain that they name" in said.out + said.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_domains": 5}, "name 4 domains in the field 'cluster'.*--config.num_domains=4"),
        ({"corpus.domain_field": "topic"}, "0 documents read.*240 records that name no domain"),
        ({"corpus.levels": (2,)}, "set one of both"),
    ],
)
def test_refusals(folder, tmp_path, changes, words):
    changes |= {"corpus.sources": (str(folder / "text.jsonl"),)}
    with pytest.raises(UserError, match=words):
        stages.prepare(config(tmp_path, **changes))


def test_a_text_file_names_no_domain(tmp_path):
    (tmp_path / "a.txt").write_text("Some text.")
    with pytest.raises(UserError, match=r"a\.txt is a text, which has no field 'cluster'"):
        stages.prepare(config(tmp_path, **{"corpus.sources": (str(tmp_path),)}))


def test_a_domain_of_which_no_document_is_left(tmp_path):
    rows = records()
    rows.append({"text": rows[0]["text"], "cluster": 99})  # a duplicate: the first one stays
    write(tmp_path / "text.jsonl", rows)
    with pytest.raises(UserError, match="'99' in the field 'cluster' no train document"):
        stages.prepare(config(tmp_path, num_domains=5))


def test_a_damaged_name_in_a_column_is_reported(tmp_path):
    names = pyarrow.array([b"a", b"\xff\xfe", b"b"]).cast(pyarrow.binary())
    names = pyarrow.StringArray.from_buffers(3, names.buffers()[1], names.buffers()[2])
    table = pyarrow.table({"text": ["one text", "two texts", "three"], "cluster": names})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    report = Report()
    found = list(
        read_documents(find_files([str(tmp_path)], report), "text", report, domain_field="cluster")
    )
    assert [d.domain for d in found] == ["a", "b"]
    assert report.counts == {"no_domain": 1}


def test_the_order_of_names(tmp_path):
    # Of two that are the same number, as of all others, in any process.
    work = types.SimpleNamespace(
        cfg=types.SimpleNamespace(corpus=types.SimpleNamespace(domain_field="cluster")),
        path=tmp_path,
        sources=[SourceFile("a", "lines", "")],
    )
    (tmp_path / "documents").mkdir()
    for names, ordered in (
        (["10", "07", "7", "-1"], ["-1", "07", "7", "10"]),
        (["10", "9", "b"], ["10", "9", "b"]),
    ):
        (tmp_path / "documents" / "000000.json").write_text(json.dumps({"domains": names}))
        assert given.given_domains(work) == ordered


def test_a_training_asks_for_the_field_that_there_was(tiny_corpus, folder):
    corpus = open_corpus(tiny_corpus)
    with pytest.raises(UserError, match="domain_field = 'cluster', prepared with ''"):
        provenance.check_against(tiny_config(**{"corpus.domain_field": "cluster"}), corpus)
    with pytest.raises(UserError, match=r"near_duplicates = 0\.8, prepared with 0\.0"):
        provenance.check_against(tiny_config(**{"corpus.near_duplicates": 0.8}), corpus)
    provenance.check_against(config(folder), open_corpus(folder / "corpus"))


def test_another_field_is_another_corpus(folder, capsys):
    changed = config(folder, **{"corpus.domain_field": ""})
    with pytest.raises(UserError, match=r"corpus\.domain_field: cluster, now "):
        stages.prepare(changed)
    assert cli.run(["domains", f"--corpus={folder / 'corpus'}"]) == 0
    assert "21" in capsys.readouterr().out


def test_shards_and_merges_give_the_same_corpus(folder, tmp_path):
    cfg = config(tmp_path, **{"corpus.sources": (str(folder / "text.jsonl"),)})
    for _ in range(8):
        stages.prepare_part(cfg, Part(0, 1, merges=False))
        if corpus := stages.prepare_part(cfg, Part(number=0)):
            break
    assert corpus.fingerprint == open_corpus(folder / "corpus").fingerprint
