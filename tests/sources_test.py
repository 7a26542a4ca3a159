"""Sources: what is found and in which order, what damage costs, splits by content."""

import gzip
import json
import os
import pathlib

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from soup_jax.data import decompress, readers
from soup_jax.data import sources as corpus
from soup_jax.data.damage import DAMAGE, MAX_ENTRIES, Report
from soup_jax.data.readers import text_hash
from soup_jax.errors import UserError


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


def read(*sources: str | pathlib.Path, start=(0, 0), field="text"):
    report = Report()
    files = corpus.find_files([str(s) for s in sources], report)
    return list(corpus.read_documents(files, field, report, start=start)), report


def texts_of(documents: list[readers.Document]) -> list[str]:
    return [document.text for document in documents]


TEXTS = [f"document {i} " + "words and more words " * (i % 7) for i in range(50)]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines(TEXTS)),
        ("a.ndjson", b"\xef\xbb\xbf" + lines(TEXTS).replace(b"\n", b"\r\n").rstrip()),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS))),
        ("a.json.gz", gzip.compress(lines(TEXTS[:9])) + gzip.compress(lines(TEXTS[9:])) + b"\0\0"),
        ("a.jsonl.zst", zstandard.compress(lines(TEXTS))),
        (
            "A.JSONL.ZST",
            zstandard.compress(lines(TEXTS[:9])) + zstandard.compress(lines(TEXTS[9:])),
        ),
    ],
)
def test_every_kind_of_line_file_gives_the_same_documents(tmp_path, name, data, monkeypatch):
    monkeypatch.setattr(decompress, "_READ_BYTES", 37)
    monkeypatch.setattr(decompress, "_PIECE_BYTES", 23)  # members and lines fall on odd places
    (tmp_path / name).write_bytes(data)
    documents, report = read(tmp_path / name)
    assert texts_of(documents) == TEXTS
    assert [d.hash for d in documents] == [text_hash(t) for t in TEXTS]
    assert not report.counts
    if "json.gz" not in name.replace("jsonl", ""):
        assert [d.line for d in documents] == list(range(1, 51))


def test_parquet_rows_and_text_files(tmp_path):
    values = [*TEXTS[:3], None, "", "last"]
    table = pyarrow.table({"n": list(range(6)), "text": values})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=2)
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfx = 1\r\n\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("größe".encode()))
    documents, report = read(tmp_path)
    assert texts_of(documents) == ["x = 1\r\n\n", *TEXTS[:3], "last", "größe"]
    assert [d.line for d in documents] == [1, 1, 2, 3, 6, 1]
    assert report.counts == {"no_text": 1, "empty": 1}
    documents, report = read(tmp_path / "b.parquet", field="body")
    assert not documents
    assert "'n', 'text'" in report.entries["no_text"][0]["reason"]


def test_order_is_fixed_and_a_file_is_read_once(tmp_path):
    names = [
        "b/z.txt",
        "b/a.txt",
        "b-c/a.txt",
        "a.txt",
        "c.txt",
        ".hidden.txt",
        ".git/x.txt",
        "n.bin",
    ]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / "b" / "back").symlink_to(tmp_path)  # a loop
    os.mkfifo(tmp_path / "pipe.txt")  # would block
    documents, _ = read(tmp_path)
    assert texts_of(documents) == ["a.txt", "b/a.txt", "b/z.txt", "b-c/a.txt", "c.txt"]
    documents, _ = read(tmp_path / "c.txt", tmp_path / "b" / "*.txt", tmp_path)
    assert texts_of(documents) == ["c.txt", "b/a.txt", "b/z.txt", "a.txt", "b-c/a.txt"]
    documents, _ = read(tmp_path / "**" / "a.txt")
    assert sorted(texts_of(documents)) == ["a.txt", "b-c/a.txt", "b/a.txt"]


def test_damage_is_reported_with_its_place_and_costs_only_itself(tmp_path):
    good = lines(["one", "two"])
    (tmp_path / "a.jsonl").write_bytes(
        good + b'{"text": "cut\n[1, 2]\n\n{"text": 3}\n{"body": "x"}\n{"text": " \\n"}\n'
        b'{"text": "\xff"}\n{"text": "\\ud800"}\n' + b"[" * 100_000 + b"\n" + lines(["three"])
    )
    (tmp_path / "b.txt").write_bytes(b"ab\xffcd")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS), mtime=0)[:-150])
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(lines(TEXTS) * 500)[:-30])
    (tmp_path / "e.jsonl.gz").write_bytes(b"not gzip at all")
    (tmp_path / "f.parquet").write_bytes(b"PAR1 not parquet")
    (tmp_path / "g.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "h.txt").write_bytes(b"")
    (tmp_path / "z.txt").write_text("the end")
    documents, report = read(tmp_path)
    by_file = {}
    for d in documents:
        by_file.setdefault(os.path.basename(d.source), []).append(d.text)
    assert by_file["a.jsonl"] == ["one", "two", "three"]
    assert by_file["z.txt"] == ["the end"]
    # Truncated: everything before the damage is there, nothing after, nothing wrong.
    assert 0 < len(by_file["c.jsonl.gz"]) < len(TEXTS)
    assert by_file["c.jsonl.gz"] == TEXTS[: len(by_file["c.jsonl.gz"])]
    assert set(by_file) == {"a.jsonl", "c.jsonl.gz", "z.txt"} | (set(by_file) & {"d.jsonl.zst"})
    places = {
        kind: [(os.path.basename(e["source"]), e["line"]) for e in entries]
        for kind, entries in report.entries.items()
    }
    assert places == {
        "broken_json": [("a.jsonl", 3), ("a.jsonl", 4), ("a.jsonl", 11)],
        "no_text": [("a.jsonl", 6), ("a.jsonl", 7)],
        "empty": [("a.jsonl", 8), ("h.txt", 1)],
        "invalid_utf8": [("a.jsonl", 9), ("a.jsonl", 10), ("b.txt", 0)],
        "truncated": [
            ("c.jsonl.gz", len(by_file["c.jsonl.gz"])),
            ("d.jsonl.zst", len(by_file.get("d.jsonl.zst", []))),
            ("e.jsonl.gz", 0),
        ],
        "unreadable": [("f.parquet", 0), ("g.txt", 0)],
    }
    assert report.counts == {kind: len(p) for kind, p in places.items()}
    assert len(report.lines()) == len(DAMAGE) - 2  # nothing is too large, no domain is asked for
    assert str(tmp_path / "a.jsonl") + ":3" in report.lines()[0]


@pytest.mark.parametrize("name", ["pipe.jsonl", "zero.txt"])
def test_pipes_and_devices_are_refused_by_name_and_passed_over_by_globs(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]))
    with pytest.raises(UserError, match=f"{name}' is a pipe or device"):
        read(tmp_path / name)
    with pytest.raises(UserError, match="/dev/zero' is a pipe or device"):
        read("/dev/zero")
    documents, report = read(tmp_path / "*.*")
    assert texts_of(documents) == ["one"]
    assert not report.counts


def test_a_file_that_became_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    files = corpus.find_files([str(tmp_path)], Report())
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")
    report = Report()
    assert not list(corpus.read_documents(files, "text", report))
    assert "no regular file" in report.lines()[0]


def test_the_name_of_a_file_need_not_be_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "wb") as f:
        f.write(b"\xff\xfea\0")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "a.parquet")
    os.rename(tmp_path / "a.parquet", os.fsencode(tmp_path) + b"/\xfe.parquet")
    documents, report = read(tmp_path)
    assert texts_of(documents) == ["one"]
    assert "\\udcff.txt: byte 0" in report.lines()[0].encode().decode()


def test_a_report_counts_all_and_lists_some():
    first, second = Report(), Report()
    for i in range(700):
        first.add("empty", "a", i, "x")
        second.add("empty", "b", i, "x")
    second.add("no_text", "b", 1, "y")
    total = Report(json.loads(json.dumps(first.to_json())))
    total.merge(second)
    assert total.counts == {"empty": 1400, "no_text": 1}
    assert len(total.entries["empty"]) == MAX_ENTRIES
    assert total.entries["empty"][700]["source"] == "b"
    assert first.take().counts == {"empty": 700}
    assert first.to_json() == {"counts": {}, "entries": {}}


def test_reading_continues_anywhere_as_if_never_stopped(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(lines(TEXTS[:5]) + b"broken\n" + lines(["x"]))
    )
    (tmp_path / "b.txt").write_text("a text")
    table = pyarrow.table({"text": [*TEXTS[5:9], None, "end"]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=2)
    documents, _ = read(tmp_path)
    paths = sorted(str(p) for p in tmp_path.iterdir())
    for i, document in enumerate(documents):
        start = (paths.index(document.source), document.line)
        rest, report = read(tmp_path, start=start)
        assert rest == documents[i + 1 :]
        assert report.counts.get("broken_json", 0) == (i < 5)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no sources"),
        (["nowhere"], "'nowhere' matches no file"),
        (["*.nothing"], "matches no file"),
        (["empty"], "'empty' matches no file"),
        (["x.bin"], "suffix of the source 'x.bin'"),
        (["a.txt", "x.json"], "suffix of the source 'x.json'"),
        (["a.txt", "nowhere"], "'nowhere' matches no file"),
    ],
)
def test_a_source_that_gives_nothing_is_a_user_error(tmp_path, monkeypatch, sources, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("x.bin", "x.json", "a.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        corpus.find_files(sources, Report())


def test_splits_depend_on_content_only_and_have_their_share():
    hashes = [text_hash(f"text number {i}") for i in range(20_000)]
    splits = {h: corpus.split_of(h, 0.1, 0.05) for h in hashes}
    assert splits == {h: corpus.split_of(h, 0.1, 0.05) for h in reversed(hashes)}
    share = {s: list(splits.values()).count(s) / len(hashes) for s in set(splits.values())}
    assert abs(share["validation"] - 0.1) < 0.01
    assert abs(share["held_out"] - 0.05) < 0.01
    # More validation takes from train and leaves every other document where it was.
    larger = {h: corpus.split_of(h, 0.2, 0.0) for h in hashes}
    assert all(larger[h] == "validation" for h in hashes if splits[h] == "validation")
    assert {corpus.split_of(h, 0.0, 0.0) for h in hashes} == {"train"}
    assert all(0 <= corpus.hash_fraction(h) < 1 for h in hashes)
    assert corpus.hash_fraction(b"\xff" * 16) < 1
