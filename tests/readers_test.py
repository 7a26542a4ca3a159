"""Reading one file: limits that hold for whatever it claims to be, and reasons that help."""

import gzip
import json
import pathlib
import subprocess
import sys
import zlib

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from soup_jax.data import readers
from soup_jax.data.damage import Report
from soup_jax.data.sources import find_files, read_documents


def read(path: pathlib.Path, field: str = "text") -> tuple[list[readers.Document], Report]:
    report = Report()
    return list(read_documents(find_files([str(path)], report), field, report)), report


def reason(path: pathlib.Path, kind: str, field: str = "text") -> str:
    documents, report = read(path, field)
    assert not documents
    assert report.counts == {kind: 1}
    return report.entries[kind][0]["reason"]


# What a file does to the memory is seen in a process of its own: it reads, and prints the damage
# and how many MB its peak rose.
PROGRAM = """
import json, resource, sys
import pyarrow.parquet
from soup_jax.data.damage import Report
from soup_jax.data.sources import find_files, read_documents
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
before, report = peak(), Report()
for _ in read_documents(find_files(sys.argv[1:], report), "text", report):
    pass
print(json.dumps([report.counts, peak() - before]))
"""


def measured(path: pathlib.Path) -> tuple[dict[str, int], int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, path], capture_output=True, text=True, check=True
    )
    return tuple(json.loads(done.stdout))


def zstd_bomb(num_bytes: int, *, window_log: int = 20) -> bytes:
    """A frame of letters: every block of 4 bytes stands for 128 kB."""
    block = (1 << 17 << 3 | 1 << 1).to_bytes(3, "little") + b"a"
    head = b"\x28\xb5\x2f\xfd\x00" + bytes([window_log - 10 << 3])
    return head + block * (num_bytes >> 17) + (1).to_bytes(3, "little")


def gzip_bomb(num_bytes: int, byte: bytes = b"a") -> bytes:
    stream, piece = zlib.compressobj(9, wbits=31), byte * (1 << 20)
    return b"".join(stream.compress(piece) for _ in range(num_bytes >> 20)) + stream.flush()


@pytest.mark.parametrize(
    ("name", "data", "damage"),
    [
        ("a.txt.gz", gzip_bomb(1 << 30), {"too_large": 1}),
        ("a.txt.zst", zstd_bomb(3 << 30), {"too_large": 1}),
        ("a.jsonl.gz", gzip_bomb(1 << 30), {"too_large": 1}),
        ("a.jsonl.zst", zstd_bomb(3 << 30), {"too_large": 1}),
        ("lines.jsonl.gz", gzip_bomb(1 << 22, b"\n"), {}),
    ],
)
def test_a_small_file_of_gigabytes_does_not_fill_the_memory(tmp_path, name, data, damage):
    assert len(data) < 1 << 21
    (tmp_path / name).write_bytes(data)
    found, megabytes = measured(tmp_path / name)
    assert found == damage
    assert megabytes < 300


def test_the_largest_document_takes_less_than_a_gigabyte(tmp_path):
    # One character outside the Basic Multilingual Plane makes Python use four bytes for each.
    text = "\U0001f35e" + "a" * (readers.MAX_DOCUMENT_BYTES - 100)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(json.dumps({"text": text}, ensure_ascii=False).encode()))
    found, megabytes = measured(path)
    assert found == {}
    assert megabytes < 1000


@pytest.mark.parametrize("piece", ['{"":0},', "[0],", '"ab",'])
def test_a_line_of_json_takes_less_than_a_gigabyte(tmp_path, piece):
    inner = piece * ((readers.MAX_DOCUMENT_BYTES - 100) // len(piece))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(f'{{"x": [{inner}0]}}'.encode()))
    _, megabytes = measured(tmp_path / "a.jsonl.zst")
    assert megabytes < 700


def test_a_line_of_many_objects_is_told_and_one_with_a_text_of_brackets_is_read(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(readers, "MAX_CONTAINERS", 100)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "more": [{}] * 99}))
    assert "101 JSON objects and lists; the limit" in reason(tmp_path / "a.jsonl", "too_large")
    text = '[{"' * 1000 + "\\"
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text, "more": [{}] * 98}))
    assert read(tmp_path / "b.jsonl")[0][0].text == text


def test_a_value_of_parquet_that_repeats_does_not_fill_the_memory(tmp_path):
    values = pyarrow.array(["a" * (1 << 24)]).dictionary_encode()
    table = pyarrow.table({"text": values.take(pyarrow.array([0] * 50))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    found, megabytes = measured(tmp_path / "a.parquet")
    assert found == {}
    assert megabytes < 500


def test_a_window_that_takes_too_much_memory_says_how_to_recompress(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstd_bomb(1 << 20, window_log=30))
    assert "zstd -dc --long=31" in reason(tmp_path / "a.txt.zst", "too_large")
    (tmp_path / "b.txt.zst").write_bytes(zstd_bomb(1 << 20, window_log=27))
    assert len(read(tmp_path / "b.txt.zst")[0][0].text) == 1 << 20


def test_what_is_too_large_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 200_000)
    one, two = (json.dumps({"text": t}).encode() + b"\n" for t in ("one", "two"))
    long = json.dumps({"text": "x" * 200_000}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(one + long + two + long.rstrip())
    documents, report = read(tmp_path / "a.jsonl")
    assert [(d.text, d.line) for d in documents] == [("one", 1), ("two", 3)]
    assert [e["line"] for e in report.entries["too_large"]] == [2, 4]
    table = pyarrow.table({"text": ["one", "x" * 200_001, "two", "y" * 200_000]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    documents, report = read(tmp_path / "b.parquet")
    assert [d.line for d in documents] == [1, 3, 4]
    assert report.counts == {"too_large": 1}
    (tmp_path / "c.txt").write_text("x" * 200_001)
    assert "split -C" in reason(tmp_path / "c.txt", "too_large")
    (tmp_path / "d.txt").write_text("x" * 200_000)
    assert len(read(tmp_path / "d.txt")[0]) == 1


def test_frames_of_every_form_are_read(tmp_path):
    texts = [f"text {i} " * (1 + i % 900) for i in range(1, 2000)]
    data = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    whole = zstandard.ZstdCompressor(write_checksum=True, level=19).compress(data[:1_000_000])
    streaming = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    rest = streaming.compress(data[1_000_000:]) + streaming.flush()
    other = b"\x55\x2a\x4d\x18\x05\0\0\0other"  # a frame that readers pass over
    (tmp_path / "a.jsonl.zst").write_bytes(whole + other + rest + b"\0\0")
    documents, report = read(tmp_path / "a.jsonl.zst")
    assert [d.text for d in documents] == texts
    assert not report.counts
    for cut in (len(whole) - 1, len(whole) - 5, len(whole) + 3, 3):
        (tmp_path / "a.jsonl.zst").write_bytes((whole + rest)[:cut])
        assert read(tmp_path / "a.jsonl.zst")[1].counts["truncated"] == 1
    damaged = bytearray(whole)
    damaged[-1] ^= 1  # the checksum
    (tmp_path / "a.jsonl.zst").write_bytes(damaged)
    assert read(tmp_path / "a.jsonl.zst")[1].counts["truncated"] == 1


def test_reasons_say_where_the_text_is(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": "1", "body": "a longer text", "data": {"text": "x"}}))
    assert reason(path, "no_text") == "no field 'text'; the fields are 'id', 'body', 'data'"
    assert read(path)[1].text_field() == "body"
    assert reason(path, "no_text", "data") == "'data' is dict, not a text"
    path.write_text(json.dumps({"x" * 1000: 1}))
    assert len(reason(path, "no_text")) < 150
    assert read(path)[1].text_field() == ""
    table = pyarrow.table({"n": [1, 2], "body": ["a", "b"], "text": [b"a", b"b"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert reason(tmp_path / "a.parquet", "no_text") == "the column 'text' is binary, not a text"
    assert read(tmp_path / "a.parquet")[1].text_field() == "body"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_says_how_to_convert(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("a text of words".encode(encoding))
    assert "iconv -f UTF-16 -t UTF-8" in reason(tmp_path / "a.txt", "invalid_utf8")
    (tmp_path / "b.jsonl").write_bytes((json.dumps({"text": "words"}) * 2).encode(encoding))
    documents, report = read(tmp_path / "b.jsonl")
    assert not documents
    assert "iconv -f UTF-16" in " ".join(report.lines())


def test_a_column_of_categories_is_a_column_of_texts(tmp_path):
    values = pyarrow.array(["one", None, "two", "one"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    documents, report = read(tmp_path / "a.parquet")
    assert [(d.text, d.line) for d in documents] == [("one", 1), ("two", 3), ("one", 4)]
    assert report.counts == {"no_text": 1}


def test_members_of_gzip_end_where_they_end(tmp_path):
    data = gzip.compress(b"a" * (1 << 20)) + b"\0" * 9 + gzip.compress(b"b" * (3 << 18))
    (tmp_path / "a.txt.gz").write_bytes(data)
    assert read(tmp_path / "a.txt.gz")[0][0].text == "a" * (1 << 20) + "b" * (3 << 18)
    (tmp_path / "a.txt.gz").write_bytes(data[:-1])
    assert reason(tmp_path / "a.txt.gz", "truncated").endswith("the compressed data ends early")
