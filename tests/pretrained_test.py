"""A Llama of transformers as the shared parameters: what is read, and what is refused.

tests/hf_test.py reads one that transformers wrote.
"""

import json
import shutil
import types

import jax
import llamas
import numpy as np
import pytest
from conftest import tiny_config
from safetensors.numpy import load_file, save_file

from soup_jax import tree
from soup_jax.data.tokenizer import train_tokenizer
from soup_jax.errors import UserError
from soup_jax.models.base import ModelSettings, make
from soup_jax.soup import layout
from soup_jax.training import build, pretrained


def config(**fields):
    model = {f"model.{name}": value for name, value in llamas.MODEL.items()}
    return tiny_config(**({"vocab_size": 300, "experts.init_scale": 0.0} | model | fields))


def read(folder, tokenizer=None, **fields):
    """The shared parameters of a run with these fields, sliced over all devices."""
    cfg = config(**fields)
    settings = ModelSettings.from_mapping(cfg.model, vocab_size=cfg.vocab_size, seq_len=32)
    abstract = jax.eval_shape(make("llama", settings).init, jax.random.key(0))
    mesh = build.make_mesh(cfg)
    shardings = layout.storage(mesh, abstract)
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )
    corpus = types.SimpleNamespace(path=tokenizer or folder)
    found = pretrained.read(folder, cfg, abstract, corpus)
    assert jax.tree.map(lambda x: x.sharding, found) == shardings
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return llamas.specialist(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "hf"
    source.save(out, format="hf")
    return out


@pytest.mark.parametrize("fields", llamas.KINDS)
def test_what_was_exported_is_read_and_exported_again(fields, tmp_path):
    specialist = llamas.specialist(tmp_path, **fields)
    first, second = tmp_path / "first", tmp_path / "second"
    specialist.save(first, format="hf", shard_bytes=20_000)
    given = {f"model.{name}": value for name, value in fields.items()}
    found = read(first, **given)
    assert tree.flatten(found).keys() == tree.flatten(specialist.params).keys()
    jax.tree.map(np.testing.assert_array_equal, found, specialist.params)
    again = llamas.specialist(tmp_path, **fields)
    object.__setattr__(again, "params", jax.device_get(found))
    again.save(second, format="hf", shard_bytes=20_000)
    for path in first.iterdir():
        assert (second / path.name).read_bytes() == path.read_bytes(), path.name


def test_half_precision_is_read_as_what_the_run_stores(source, tmp_path):
    source.save(tmp_path / "out", format="hf", dtype="bfloat16")
    found = tree.flatten(read(tmp_path / "out"))
    for path, x in tree.flatten(source.params).items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], np.asarray(x).astype("bfloat16").astype("f"))


def test_each_field_that_differs_is_named_with_its_flag(exported):
    fields = {"model.dim": 64, "model.rope_theta": 1e4, "vocab_size": 400}
    with pytest.raises(UserError) as e:
        read(exported, **fields)
    said = str(e.value)
    assert "vocab_size: 400 -> 300, model.dim: 64 -> 32, model.rope_theta: 10000.0 -> 500.0" in said
    assert said.endswith(
        "Set --config.vocab_size=300 --config.model.dim=32 --config.model.rope_theta=500.0"
    )


def changed(exported, folder, **fields):
    shutil.copytree(exported, folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2"}, "the architecture 'qwen2'; soup_jax reads 'llama'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type 'llama3'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 16}, r"head_dim 16\) than hidden_size / num_attention_heads = 8"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"sliding_window": 128}, "sliding_window 128"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"num_attention_heads": None}, "is damaged, or no config.json of a Llama"),
    ],
)
def test_what_our_network_does_not_have_is_refused(exported, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        read(changed(exported, tmp_path / "other", **fields))


def test_the_names_of_older_versions_are_read(exported, tmp_path, source):
    older = {"rope_parameters": None, "head_dim": None, "rope_scaling": None}
    jax.tree.map(
        np.testing.assert_array_equal,
        read(changed(exported, tmp_path / "older", **older)),
        source.params,
    )


def test_tensors_that_do_not_fit_are_named(exported, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(exported, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors["model.norm.bias"] = tensors.pop("model.norm.weight")
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, file)
    with pytest.raises(UserError) as e:
        read(folder)
    assert "model.norm.weight missing; model.norm.bias in no network of ours" in str(e.value)
    assert f"{name} is F32[32, 48], expected floats of [48, 32]" in str(e.value)
    assert "inv_freq" not in str(e.value)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="no safetensors file"):
        read(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        read(folder)


def test_another_tokenizer_and_experts_that_are_not_zero_are_told(exported, tmp_path, caplog):
    read(exported)
    assert not caplog.records
    train_tokenizer(["other words entirely"], 270).save(tmp_path / "tokenizer.json")
    read(exported, tokenizer=tmp_path, **{"experts.init_scale": 0.1})
    assert "has another tokenizer than the corpus" in caplog.text
    assert "experts.init_scale = 0.1: specialists at step 0 are not" in caplog.text
