"""Artefacts that were changed after they were written: each change is found, none is silent."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from jax.sharding import NamedSharding, PartitionSpec

from soup_jax import inputs, storage
from soup_jax.cli import main
from soup_jax.data.corpus import fingerprint_of, open_corpus
from soup_jax.errors import UserError
from soup_jax.specialists.verify import verify
from soup_jax.training import integrity
from soup_jax.training import setup as run_lib
from soup_jax.training.checkpoint import Checkpointer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_checksums_are_those_of_the_values_on_any_mesh(dtype):
    values = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    leaf = jnp.asarray(values).astype(dtype)
    expected = integrity.checksums({"a": {"b": leaf}})
    assert list(expected) == ["a/b"]
    for shape, spec in (((8,), ("x",)), ((4, 2), ("x", "y")), ((2, 4), (None, ("x", "y")))):
        mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)])
        placed = jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))
        assert integrity.checksums({"a": {"b": placed}}) == expected


def test_every_flipped_bit_and_every_exchange_changes_a_checksum():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 1 << 32, 64, dtype=np.uint32)
    rows = [values]
    for i, bit in zip(rng.integers(0, 64, 300), rng.integers(0, 32, 300)):
        changed = values.copy()
        changed[i] ^= np.uint32(1) << np.uint32(bit)
        rows.append(changed)
    for i in range(63):
        changed = values.copy()
        changed[[i, i + 1]] = changed[[i + 1, i]]
        rows.append(changed)
    as_floats = np.stack(rows).view(np.float32)  # NaNs among them
    sums = jax.vmap(integrity._checksum)(jnp.asarray(as_floats))
    different = (np.asarray(sums[1:]) != np.asarray(sums[0])).any(1)
    same = np.array([np.array_equal(r, values) for r in rows[1:]])
    np.testing.assert_array_equal(different, ~same)


def flip(file: pathlib.Path) -> None:
    # More than half of the bytes that orbax writes are of no array: not every flip is a change.
    data = bytearray(file.read_bytes())
    for i in range(1, 20):
        data[len(data) * i // 20] ^= 1
    file.write_bytes(data)


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def edit_data(folder: pathlib.Path, **fields) -> None:
    file = folder / "data" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def copy_over(source: pathlib.Path, target: pathlib.Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


TAMPERING = {
    "flipped bytes of the parameters": lambda c, _: flip(largest(c / "12" / "params")),
    "an older step in its place": lambda c, _: copy_over(c / "10", c / "12"),
    "another step number": lambda c, _: edit_data(c / "12", step=11),
    "edited cursors": lambda c, _: edit_data(c / "12", cursors=[0] * 6),
    "an empty data item": lambda c, _: (c / "12" / "data" / "metadata").write_text("{}"),
    "parameters of another run": lambda c, other: copy_over(
        other / "12" / "params", c / "12" / "params"
    ),
    "optimizer state of another run": lambda c, other: copy_over(
        other / "12" / "opt_state", c / "12" / "opt_state"
    ),
}


@pytest.fixture(scope="module")
def other_run(tiny_corpus, tmp_path_factory):
    """Checkpoints of equal shapes and steps, from another seed."""
    folder = tmp_path_factory.mktemp("other")
    cfg = tiny_config(**{"corpus.dir": tiny_corpus, "seed": 5})
    run = run_lib.setup(cfg, folder)
    with Checkpointer(folder / "checkpoints", cfg) as checkpointer:
        checkpointer.save(run.init(), run.data_state(12))
    return folder / "checkpoints"


@pytest.mark.parametrize("what", TAMPERING)
def test_a_changed_checkpoint_is_told_and_passed_over(what, tiny_run, other_run, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    TAMPERING[what](run / "checkpoints", other_run)
    with pytest.raises(UserError, match=r"is damaged:\n  \S*checkpoints/12: \S"):
        verify(run)
    cfg = run_lib.config_lib.load(run / "config.json")
    with Checkpointer(run / "checkpoints") as reader:
        restored = reader.restore(run_lib.setup(cfg, run).abstract)
    assert restored[1]["step"] == 10
    assert "unreadable checkpoint, trying the one before: step 12: " in caplog.text


def test_a_file_in_the_place_of_the_checkpoints_is_not_sound(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "run" / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints is a file, where a run has a folder"):
        verify(tmp_path / "run")


def test_what_is_sound_is_said_to_be(tiny_run, tiny_corpus, capsys):
    assert main.run(["verify", str(tiny_run)]) == 0
    assert "checkpoints/12: " in (out := capsys.readouterr().out)
    assert "arrays as they were saved" in out
    assert main.run(["verify", tiny_corpus]) == 0
    assert main.run(["verify", str(pathlib.Path(tiny_corpus) / "windows")]) == 2
    assert "is no corpus, run, soup folder or specialist" in capsys.readouterr().err


def test_damaged_lines_of_metrics_are_counted(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": "x", "kind": "train"}\n{"step": 3, "kind": []}\n{"step": 9, "kind": "tr')
    with pytest.raises(UserError, match=r"metrics\.jsonl: 3 of \d+ lines damaged"):
        verify(run)


@pytest.fixture
def corpus(tiny_corpus, tmp_path):
    shutil.copytree(tiny_corpus, tmp_path / "corpus")
    return tmp_path / "corpus"


def swap_tokens(corpus):
    path = corpus / "tokenizer.json"
    value = json.loads(path.read_text())
    vocab = value["model"]["vocab"]
    a, b = sorted(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + " " * (path.stat().st_size - len(text.encode())))


def edit_manifest(**fields):
    def edit(corpus):
        path = corpus / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_tokens, "tokenizer.json"),
        (lambda c: flip(c / "centroids.safetensors"), "centroids.safetensors changed"),
        (lambda c: flip(c / "offsets.safetensors"), "offsets.safetensors changed"),
        (lambda c: flip(c / "embedder.safetensors"), "embedder.safetensors changed"),
        (lambda c: (c / "domains.json").write_text("[]"), "domains.json has 2 bytes"),
        (edit_manifest(eos_id=299), "manifest.json was changed"),
        (edit_manifest(seq_len=16), "manifest.json was changed"),
        (edit_manifest(artefacts={}), "manifest.json was changed"),
        (edit_manifest(artefacts=[]), "artefacts is a list, expected an object"),
        (edit_manifest(seq_len="16"), "seq_len is a text, expected an integer"),
        (lambda c: (c / "manifest.json").write_text("{}"), "format is missing"),
        (lambda c: (c / "manifest.json").write_text("nul"), "not valid JSON"),
    ],
)
def test_a_changed_corpus_is_refused_where_it_is_opened(change, message, corpus):
    change(corpus)
    with pytest.raises(UserError, match=message):
        open_corpus(corpus)


def test_a_manifest_of_an_older_version_has_no_seal_but_a_fingerprint(corpus):
    path = corpus / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["seal"] == storage.sealed(manifest)["seal"]
    del manifest["seal"]
    assert manifest["fingerprint"] == fingerprint_of(manifest)
    path.write_text(json.dumps(manifest))
    open_corpus(corpus)
    manifest["artefacts"]["tokenizer.json"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="fingerprint is not that of the files"):
        open_corpus(corpus)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_manifest_names_no_file_elsewhere(name, corpus):
    path = corpus / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["window_files"]["train"][0]["name"] = name
    path.write_text(json.dumps(storage.sealed(manifest)))
    with pytest.raises(UserError, match=f"it names '{name}', not a file here"):
        open_corpus(corpus)


def test_structures_are_compared_field_by_field(tmp_path):
    like = {"a": int, "b?": [float], "c": {...: {"d": str}}}
    inputs.check_structure({"a": 1, "c": {}, "more": 1}, like, "x")
    inputs.check_structure({"a": 1, "b": [1, 2.5], "c": {"k": {"d": ""}}}, like, "x")
    for value, message in (
        ([], "it is a list, expected an object"),
        ({"c": {}}, "a is missing"),
        ({"a": True, "c": {}}, "a is true or false, expected an integer"),
        ({"a": 1, "b": ["1"], "c": {}}, r"b\[0\] is a text, expected a number"),
        ({"a": 1, "c": {"k": {"d": None}}}, r"c\.k\.d is null, expected a text"),
    ):
        with pytest.raises(UserError, match=f"x is damaged.*: {message}"):
            inputs.check_structure(value, like, "x")
