"""Exports in transformers, and models of transformers here; `bash launch/test.sh --hf` runs it.

Logits are compared in float32: the bound is 1e-4 of the largest.
"""

import dataclasses
import logging

import jax
import llamas
import numpy as np
import pretrained_test
import pytest

from soup_jax.data.tokenizer import Tokenizer
from soup_jax.errors import UserError
from soup_jax.specialists.export import check_hf
from soup_jax.specialists.generate import generate_ids

transformers = pytest.importorskip("transformers", minversion="4.57")
torch = pytest.importorskip("torch")


def loaded(folder, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, **settings
    )


def their_logits(model, rows):
    with torch.no_grad():
        return model(torch.tensor(rows)).logits.numpy()


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("fields", llamas.KINDS)
def test_logits_ids_and_greedy_texts_are_ours(fields, tmp_path, caplog):
    specialist = llamas.specialist(tmp_path, **fields)
    with caplog.at_level(logging.INFO, "soup_jax"):
        specialist.save(tmp_path / "out", format="hf", shard_bytes=20_000)
    assert f"checked with transformers {transformers.__version__}: logits of 4 rows" in caplog.text
    model = loaded(tmp_path / "out")
    assert model.dtype == torch.float32
    rows = np.random.default_rng(0).integers(0, 300, (3, 48))
    logits = jax.jit(specialist.model.logits)(specialist.params, rows)
    assert_close(their_logits(model, rows), logits)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in llamas.TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask"}
        ids = inputs["input_ids"][0].tolist()
        assert ids == [0, *specialist.tokenizer.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        found = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, len(ids) :]
        settings = {"seq_len": 48, "max_tokens": 12, "temperature": 0, "eos_id": 0}
        expected = generate_ids(specialist.model, specialist.params, ids, **settings)
        assert found.tolist() == expected
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0)
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    assert len(tokenizer) == specialist.tokenizer.vocab_size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_loaded_as_such(dtype, tmp_path, caplog):
    specialist = llamas.specialist(tmp_path)
    with caplog.at_level(logging.INFO, "soup_jax"):
        specialist.save(tmp_path / "out", format="hf", dtype=dtype)
    assert "checked with transformers" in caplog.text
    model = loaded(tmp_path / "out", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    rounded = np.asarray(specialist.params["final_norm"]["scale"]).astype(dtype).astype("f")
    np.testing.assert_array_equal(model.model.norm.weight.detach().float(), rounded)


def test_other_logits_or_ids_are_refused_and_nothing_is_written(tmp_path, monkeypatch):
    specialist, out = llamas.specialist(tmp_path / "source"), tmp_path / "out"
    ours = check_hf._our_logits
    monkeypatch.setattr(check_hf, "_our_logits", lambda *a: ours(*a) * 1.001)
    with pytest.raises(UserError, match="computes other logits than soup_jax"):
        specialist.save(out, format="hf")
    monkeypatch.undo()
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: [1, 2, 3])
    with pytest.raises(UserError, match="reads this tokenizer in another way"):
        specialist.save(out, format="hf")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("fields", llamas.KINDS)
def test_a_model_that_transformers_wrote_has_its_logits_here(fields, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=fields["num_kv_heads"],
        tie_word_embeddings=fields["tie_embeddings"],
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        **rope_theta(500.0),
    )
    theirs = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    specialist = llamas.specialist(tmp_path, **fields)  # its tokenizer, too
    given = {f"model.{name}": value for name, value in fields.items()}
    params = jax.device_get(pretrained_test.read(tmp_path, **given))
    rows = np.random.default_rng(0).integers(0, 300, (3, 48))
    assert_close(jax.jit(specialist.model.logits)(params, rows), their_logits(theirs, rows))

    dataclasses.replace(specialist, params=params).save(tmp_path / "again", format="hf")
    again = loaded(tmp_path / "again").state_dict()
    assert again.keys() == theirs.state_dict().keys()
    for name, x in theirs.state_dict().items():
        assert torch.equal(again[name], x), name


def rope_theta(value):
    if transformers.__version__.startswith("4."):
        return {"rope_theta": value}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


@pytest.mark.parametrize("rope", ["linear", "llama3"])
def test_scaled_positions_of_transformers_are_refused(rope, tmp_path):
    scaling = {"rope_type": rope, "factor": 2.0}
    if rope == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling |= {"original_max_position_embeddings": 16}
    if transformers.__version__.startswith("4."):
        config = transformers.LlamaConfig(rope_scaling=scaling)
    else:
        config = transformers.LlamaConfig(rope_parameters=scaling | {"rope_theta": 500.0})
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"rope_type '{rope}'"):
        pretrained_test.read(tmp_path)
