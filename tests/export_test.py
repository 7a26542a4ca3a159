"""Exports for other libraries, without these: files, tensors, token ids, and what is refused.

tests/hf_test.py loads them with transformers.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import shutil

import jax
import llamas
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from soup_jax.cli import main
from soup_jax.errors import UserError
from soup_jax.specialists.export import check_hf
from soup_jax.specialists.specialist import Specialist
from soup_jax.specialists.verify import verify

IDS = [0, *np.random.default_rng(0).integers(0, 300, 20).tolist()]
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "recipe.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(autouse=True)
def _without_torch(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "torch" else find(n, *a)
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Specialist:
    return llamas.specialist(tmp_path_factory.mktemp("source"))


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("fields", llamas.KINDS)
def test_logits_of_the_exported_tensors_are_ours(fields, tmp_path):
    specialist = llamas.specialist(tmp_path, **fields)
    out = tmp_path / "out"
    specialist.save(out, format="hf")
    tensors, config = load_file(out / "model.safetensors"), read(out / "config.json")
    assert ("lm_head.weight" in tensors) != fields["tie_embeddings"]
    logits = jax.jit(specialist.model.logits)(specialist.params, np.array([IDS]))[0]
    expected = llamas.numpy_logits(tensors, config, IDS)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_files_say_what_was_exported(source, tmp_path, caplog):
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO, "soup_jax"):
        source.save(out, format="hf", dtype="bfloat16")
    assert "not checked against transformers: torch is not installed" in caplog.text
    assert {p.name for p in out.iterdir()} == FILES
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    config = read(out / "config.json")
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500
    assert (config["vocab_size"], config["max_position_embeddings"]) == (300, 48)
    assert config["bos_token_id"] == config["eos_token_id"] == 0
    card = (out / "README.md").read_text()
    for part in ("cakes, step 12", "30 documents", "  - 75.0% cooking\n  - 25.0% sailing"):
        assert part in card
    recipe = read(out / "recipe.json")
    assert recipe["h"] == source.recipe["h"]
    assert set(recipe["exported"]["files"]) == FILES - {"README.md", "recipe.json"}
    (line,) = verify(out)
    assert "exported as hf" in line
    with pytest.raises(UserError, match="is an export in the format 'hf'"):
        Specialist.load(out)
    with (out / "config.json").open("a") as f:
        f.write("\n")
    with pytest.raises(UserError, match=r"config\.json is missing or not what"):
        verify(out)


def test_shards_hold_the_same_tensors_rounded(source, tmp_path):
    source.save(tmp_path / "one", format="hf")
    source.save(tmp_path / "many", format="hf", dtype="bfloat16", shard_bytes=20_000)
    one = load_file(tmp_path / "one" / "model.safetensors")
    index = read(tmp_path / "many" / "model.safetensors.index.json")
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-0000{len(shards)}.safetensors"
    assert len(shards) > 1
    found = {}
    for name in shards:
        shard = load_file(tmp_path / "many" / name)
        assert shard.keys() == {k for k, v in index["weight_map"].items() if v == name}
        assert sum(x.nbytes for x in shard.values()) <= 20_000
        found |= shard
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    assert found.keys() == one.keys()
    for name, x in one.items():
        np.testing.assert_array_equal(found[name], x.astype("bfloat16"))


def test_the_tokenizer_begins_texts_as_generate_does(source, tmp_path):
    source.save(tmp_path / "out", format="hf")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    inner.encode_special_tokens = True  # tokenizer_config.json: split_special_tokens
    settings = read(tmp_path / "out" / "tokenizer_config.json")
    assert settings["split_special_tokens"]
    assert "token_type_ids" not in settings["model_input_names"]
    for text in llamas.TEXTS:
        ids = inner.encode(text).ids
        assert ids == [0, *source.tokenizer.encode(text)]
        assert inner.decode(ids, skip_special_tokens=True) == text


def test_what_another_tokenizer_adds_is_not_taken_over(source, tmp_path):
    inner = tokenizers.Tokenizer.from_file(str(source.tokenizer_path))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    inner.enable_truncation(3)
    inner.save(str(tmp_path / "tokenizer.json"))
    other = dataclasses.replace(source, tokenizer_path=tmp_path / "tokenizer.json")
    other.save(tmp_path / "out", format="hf")
    found = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert found.encode("butter").ids == [0, *source.tokenizer.encode("butter")]


def with_model(specialist, **fields):
    recipe = specialist.recipe
    return dataclasses.replace(specialist, recipe=recipe | {"model": recipe["model"] | fields})


def test_what_cannot_be_exported_is_refused(source, tmp_path):
    out = tmp_path / "out"
    for format in ("hf", "gguf"):
        with pytest.raises(UserError, match=r"takes the shipped network.*'nets:mixer'.*soup_jax"):
            with_model(source, kind="nets:mixer").save(out, format=format)
        with pytest.raises(UserError, match="--dtype=int8 is none of float32"):
            source.save(out, format=format, dtype="int8")
    with pytest.raises(UserError, match="has other leaves: embedding"):
        with_model(source, tie_embeddings=False).save(out, format="hf")
    with pytest.raises(UserError, match="'soup_jax' does not take dtype"):
        source.save(out, dtype="bfloat16")
    large = jax.tree.map(lambda x: x * 1e6, source.params)
    with pytest.raises(UserError, match="numbers that float16 cannot hold"):
        dataclasses.replace(source, params=large).save(out, format="hf", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == []


def test_gguf_names_its_extra_and_its_tokenizers(source, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'soup_jax\[gguf\]'"):
        source.save(tmp_path / "out", format="gguf")
    inner = tokenizers.Tokenizer.from_file(str(source.tokenizer_path))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.save(str(tmp_path / "tokenizer.json"))
    other = dataclasses.replace(source, tokenizer_path=tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="no byte-level BPE that cuts words like GPT-2"):
        other.save(tmp_path / "out", format="gguf")


def test_a_check_that_fails_leaves_what_was_there(source, tmp_path, monkeypatch):
    source.save(tmp_path / "out", format="hf")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def fails(*_):
        raise UserError("other logits")

    monkeypatch.setattr("soup_jax.specialists.export.check_hf.check", fails)
    for folder in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(UserError, match="other logits"):
            source.save(folder, format="hf", dtype="bfloat16")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_command(source, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    source.save(model)
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    command = ["export", f"--model={model}"]
    assert main.run([*command, f"--out={out}", "--dtype=float16"]) == 0
    assert read(out / "config.json")["dtype"] == "float16"
    assert main.run([*command, f"--out={out}"]) == 0  # an export is replaced
    assert read(out / "config.json")["dtype"] == "float32"
    assert main.run([*command, f"--out={model}"]) == 2
    assert "holds the specialist itself" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before
    assert main.run([*command, f"--out={out}", "--dtype=int8"]) == 2
    assert main.run(command) == 2
    assert "--out is required" in capsys.readouterr().err
    shutil.rmtree(model)


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ({"torch": "2.4.0", "transformers": "4.46.3"}, "transformers is 4.46.3, older than 4.57"),
        ({"torch": "2.4.0", "transformers": "5.0.0"}, "cannot be imported: ImportError: broken"),
    ],
)
def test_libraries_that_cannot_check_stop_no_export(versions, reason, monkeypatch):
    def broken(_):
        raise ImportError("broken")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", versions.get)
    monkeypatch.setattr(importlib, "import_module", broken)
    assert reason in check_hf._why_not()
