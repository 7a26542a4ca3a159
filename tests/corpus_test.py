"""Windows on disk: every token a target once, padding, TFDS agrees, damage is noticed."""

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy
import tensorflow_datasets as tfds

from soup_jax import inputs
from soup_jax import storage as files
from soup_jax.data import windows
from soup_jax.data.corpus import FORMAT_VERSION, fingerprint_of, open_corpus
from soup_jax.errors import UserError

EOS = 0


def grouped_shards(
    folder: pathlib.Path, sizes: np.ndarray, *, dtype: str = "<u2"
) -> tuple[list[pathlib.Path], list[np.ndarray]]:
    """Shards with sizes[shard, cell] tokens, and the stream of each cell (without the first EOS).

    Token ids count up from 1 over everything, so that every token can be told from every other.
    """
    folder.mkdir(exist_ok=True)
    streams = [[] for _ in range(sizes.shape[1])]
    paths, number = [], 1
    for i, row in enumerate(sizes):
        tokens = np.arange(number, number + row.sum(), dtype=dtype)
        number += len(tokens)
        starts = np.concatenate([[0], np.cumsum(row)]).astype(np.int64)
        for c, stream in enumerate(streams):
            stream.append(tokens[starts[c] : starts[c + 1]])
        paths.append(folder / f"{i}.safetensors")
        safetensors.numpy.save_file({"tokens": tokens, "starts": starts}, paths[-1])
    return paths, [np.concatenate(stream) for stream in streams]


def write(folder: pathlib.Path, layout: windows.Layout, paths: list[pathlib.Path]) -> None:
    folder.mkdir(exist_ok=True)
    for file in layout.files():
        windows.write_window_file(folder, file, layout, paths)
    windows.write_metadata(folder, layout)


@pytest.mark.parametrize("vocab_size", [5000, 100_000])
@pytest.mark.parametrize("file_bytes", [40, 200, 1 << 20])
def test_every_token_is_a_target_exactly_once(tmp_path, monkeypatch, file_bytes, vocab_size):
    monkeypatch.setattr(windows, "FILE_BYTES", file_bytes)
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 30, size=(5, 2 * 4))  # 5 shards; 2 splits of 4 domains
    sizes[:, 2] = 0  # a domain without documents
    sizes[:, 3] = [0, 0, 8, 0, 0]  # one that fills its windows exactly
    sizes[:, 5] = [0, 0, 0, 0, 1]
    dtype = windows.token_dtype(vocab_size)
    paths, streams = grouped_shards(tmp_path / "grouped", sizes, dtype=dtype.str)
    length = 4
    counts = sizes.sum(axis=0).reshape(2, 4)
    layout = windows.Layout.of(
        {"train": counts[0], "validation": counts[1]},
        seq_len=length,
        vocab_size=vocab_size,
        eos_id=EOS,
    )
    write(tmp_path / "w", layout, paths)
    builder = tfds.builder_from_directory(tmp_path / "w")
    for s, split in enumerate(["train", "validation"]):
        source = builder.as_data_source(split)
        offsets, pad = layout.offsets[split], layout.pad[split]
        assert len(source) == offsets[-1]
        for k in range(4):
            stream = streams[4 * s + k]
            rows = [source[int(i)]["tokens"] for i in range(offsets[k], offsets[k + 1])]
            assert all(row.dtype == dtype and row.shape == (length + 1,) for row in rows)
            inputs = np.concatenate([row[:-1] for row in rows]) if rows else np.zeros(0)
            targets = np.concatenate([row[1:] for row in rows]) if rows else np.zeros(0)
            real = len(targets) - pad[k]
            np.testing.assert_array_equal(targets[:real], stream)
            assert (targets[real:] == EOS).all()
            assert 0 <= pad[k] < length
            # Each target's input is the token before it; the first one follows EOS.
            np.testing.assert_array_equal(inputs[: real + 1][:1], [EOS][: len(rows)])
            np.testing.assert_array_equal(inputs[1:real], stream[: max(real - 1, 0)])
    if file_bytes == 40:
        assert len(layout.files()) > 10


def test_a_record_is_what_tfds_serialises():
    for dtype in (np.dtype("<u2"), np.dtype("<u4")):
        tokens = np.arange(100, 109).astype(dtype)
        record = windows.record_prefix(8, dtype) + tokens.tobytes()
        features = windows._features(8, dtype)
        serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
        assert record == serializer.serialize_example(features.encode_example({"tokens": tokens}))


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory) -> pathlib.Path:
    """A folder with all that `open_corpus` needs; 3 domains, windows of 4 over several files."""
    root = tmp_path_factory.mktemp("corpus")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(windows, "FILE_BYTES", 100)
    sizes = np.array([[9, 40, 2, 7, 0, 0], [30, 1, 0, 0, 3, 0]])
    paths, _ = grouped_shards(root / "grouped", sizes)
    counts = sizes.sum(axis=0).reshape(2, 3)
    layout = windows.Layout.of(
        {"train": counts[0], "validation": counts[1]}, seq_len=4, vocab_size=500, eos_id=EOS
    )
    path = root / "corpus"
    path.mkdir()
    write(path / "windows", layout, paths)
    tensors = {f"offsets/{s}": layout.offsets[s] for s in layout.offsets}
    tensors |= {f"pad/{s}": layout.pad[s] for s in layout.pad}
    safetensors.numpy.save_file(tensors, path / "offsets.safetensors")
    files.write_json(path / "domains.json", [{"label": f"label {k}"} for k in range(3)])
    artefacts = {
        p.relative_to(path).as_posix(): {
            "bytes": p.stat().st_size,
            "sha256": inputs.sha256_file(p),
        }
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }
    window_files = {s: [] for s in layout.offsets}
    for f in layout.files():
        window_files[f.split].append({"name": f.name, "windows": f.stop - f.start})
    manifest = {"format": FORMAT_VERSION, "fingerprint": "", "artefacts": artefacts}
    manifest["fingerprint"] = fingerprint_of(manifest)
    counts = dict.fromkeys(("documents", "duplicates", "too_short", "cut"), 0)
    manifest |= {"counts": {**counts, "splits": {}}, "request": {"parameters": {}, "sources": []}}
    manifest |= {"seq_len": 4, "vocab_size": 500, "eos_id": EOS, "window_files": window_files}
    files.write_json(path / "manifest.json", manifest)
    monkeypatch.undo()
    return path


def test_an_opened_corpus_describes_itself(corpus_dir):
    corpus = open_corpus(corpus_dir)
    assert (corpus.num_domains, corpus.seq_len, corpus.vocab_size) == (3, 4, 500)
    np.testing.assert_array_equal(corpus.offsets["train"], [0, 10, 21, 22])
    np.testing.assert_array_equal(corpus.pad["train"], [1, 3, 2])
    np.testing.assert_allclose(corpus.domain_frequencies, np.array([10, 11, 1]) / 22)
    assert corpus.domain_frequencies.dtype == np.float64
    assert corpus.label(2) == "label 2"
    corpus.verify()


def test_read_windows_equals_what_tfds_decodes(corpus_dir):
    corpus = open_corpus(corpus_dir)
    assert len(corpus.manifest["window_files"]["train"]) > 1
    for split in ("train", "validation"):
        source = corpus.source(split)
        ids = np.random.default_rng(0).integers(0, len(source), 50)  # with repeats, any order
        rows = corpus.read_windows(split, ids)
        assert rows.dtype == np.int32
        np.testing.assert_array_equal(rows, np.stack([source[int(i)]["tokens"] for i in ids]))
    assert corpus.read_windows("train", []).shape == (0, 5)


def test_a_split_without_windows(tmp_path, corpus_dir):
    paths, _ = grouped_shards(tmp_path / "grouped", np.array([[5, 0]]))
    counts = {"train": np.array([5]), "validation": np.array([0])}
    layout = windows.Layout.of(counts, seq_len=4, vocab_size=9, eos_id=EOS)
    write(tmp_path / "windows", layout, paths)
    assert len(tfds.builder_from_directory(tmp_path / "windows").as_data_source("train")) == 2
    corpus = open_corpus(corpus_dir)
    empty = dataclasses.replace(corpus, path=tmp_path, offsets=layout.offsets, pad=layout.pad)
    assert len(empty.source("train")) == 2
    assert len(empty.source("validation")) == 0
    assert empty.read_windows("validation", []).shape == (0, 5)
    with pytest.raises(ValueError, match="has no windows"):
        empty.read_windows("validation", [0])


@pytest.mark.parametrize("record", [-1, 22])
def test_a_record_that_is_not_there_is_refused(corpus_dir, record):
    with pytest.raises(ValueError, match="num_records"):
        open_corpus(corpus_dir).read_windows("train", [0, record])


def test_an_unknown_split_is_a_user_error(corpus_dir):
    corpus = open_corpus(corpus_dir)
    for read in (corpus.source, lambda split: corpus.read_windows(split, [0])):
        with pytest.raises(UserError, match="no split 'held_out'; it has train, validation"):
            read("held_out")


def test_damage_is_noticed(corpus_dir, tmp_path):
    def damaged(name: str) -> pathlib.Path:
        path = tmp_path / name.replace("/", "_")
        shutil.copytree(corpus_dir, path)
        return path

    path = damaged("domains.json")
    (path / "domains.json").unlink()
    with pytest.raises(UserError, match=r"domains\.json is missing"):
        open_corpus(path)
    name = "windows/windows-train.array_record-00000-of-00003"
    path = damaged(name)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"has {len(content) - 1} bytes"):
        open_corpus(path)
    # The same size is not seen when opening, but by `verify`.
    (path / name).write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(UserError, match="00000-of-00003 differ"):
        open_corpus(path).verify()
    (path / name).write_bytes(b"\x55" * len(content))
    with pytest.raises(UserError, match=r"00000-of-00003, window \d+: .*Restore the file"):
        open_corpus(path).read_windows("train", [0])


def test_a_damaged_record_is_told_when_it_is_read(corpus_dir, tmp_path):
    shutil.copytree(corpus_dir, tmp_path / "corpus")
    corpus = open_corpus(tmp_path / "corpus")
    file = tmp_path / "corpus" / "windows" / corpus.manifest["window_files"]["train"][0]["name"]
    data = bytearray(file.read_bytes())
    record = corpus.read_windows("train", [0])[0].astype("<u2").tobytes()
    data[data.index(record)] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{file}, window 0: Corrupted"):
        open_corpus(tmp_path / "corpus").read_windows("train", [1, 0])


def test_what_is_not_a_finished_corpus_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"not a prepared corpus .*soup-jax prepare"):
        open_corpus(tmp_path / "nowhere")
    (tmp_path / ".work").mkdir()
    with pytest.raises(UserError, match=r"not finished .*soup-jax prepare"):
        open_corpus(tmp_path)
