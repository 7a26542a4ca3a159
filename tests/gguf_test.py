"""GGUF files read back, and computed by llama.cpp; `bash launch/test.sh --hf` runs it.

llama.cpp itself is tested where the package xllamacpp is installed, which brings it built.
"""

import json
import urllib.request

import jax
import llamas
import numpy as np
import pytest

from soup_jax import tree
from soup_jax.models.base import ModelSettings
from soup_jax.models.transformers_llama import config_json

gguf = pytest.importorskip("gguf")

GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def theirs_of(name):
    """The name in transformers of a tensor of llama.cpp, as in blk.0.attn_q.weight."""
    *block, part, _ = name.split(".")
    return (f"model.layers.{block[1]}." if block else "") + GGUF_NAMES[part]


@pytest.mark.parametrize("fields", llamas.KINDS)
def test_gguf_read_back_computes_our_logits(fields, tmp_path):
    specialist = llamas.specialist(tmp_path, **fields)
    specialist.save(tmp_path / "out", format="gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    stored = {t.name: t.data for t in reader.tensors}
    tensors = {f"{theirs_of(name)}.weight": x for name, x in stored.items()}
    settings = ModelSettings.from_mapping(specialist.recipe["model"], **llamas.SIZES)
    config = config_json(settings, eos_id=0, dtype="float32")
    ids = np.random.default_rng(0).integers(0, 300, 20)
    logits = jax.jit(specialist.model.logits)(specialist.params, ids[None])[0]
    expected = llamas.numpy_logits(tensors, config, ids, neighbours=True)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())

    def field(name):
        return reader.fields[name].contents()

    assert field("llama.attention.head_count_kv") == fields["num_kv_heads"]
    assert field("llama.rope.freq_base") == 500
    assert field("llama.attention.layer_norm_rms_epsilon") == np.float32(1e-5)
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert (tokens[0], kinds[0]) == ("<|endoftext|>", gguf.TokenType.CONTROL)
    assert all(tokens[i] == token for token, i in vocab["vocab"].items())
    assert kinds[len(vocab["vocab"]) :] == [gguf.TokenType.UNUSED] * (300 - len(vocab["vocab"]))
    assert field("tokenizer.ggml.merges") == [" ".join(m) for m in vocab["merges"]]
    assert field("tokenizer.ggml.add_bos_token")
    assert field("tokenizer.ggml.bos_token_id") == field("tokenizer.ggml.eos_token_id") == 0


def test_gguf_in_half_precision(tmp_path):
    specialist = llamas.specialist(tmp_path)
    for dtype, kind in (("bfloat16", "BF16"), ("float16", "F16")):
        specialist.save(tmp_path / "out", format="gguf", dtype=dtype)
        reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
        assert {t.tensor_type.name for t in reader.tensors} == {kind, "F32"}
        (found,) = [t for t in reader.tensors if t.name == "token_embd.weight"]
        table = np.asarray(tree.flatten(specialist.params)["embedding"]).astype(dtype)
        np.testing.assert_array_equal(found.data.view(table.dtype), table)


class LlamaCpp:
    """A server of llama.cpp in this process."""

    def __init__(self, path):
        xllamacpp = pytest.importorskip("xllamacpp")
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.warmup = 48, 1, False
        settings.cpuparams.n_threads = 1
        # By default keys, values and part of attention are rounded to float16.
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        flash_attention = xllamacpp.llama_flash_attn_type
        settings.flash_attn_type = flash_attention.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(settings)

    def ask(self, path, **body):
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def log_probs(self, ids, *, any_token):
        """[V] of the token after `ids`; one that is whole text is sampled, or nothing is told."""
        settings = {"n_predict": 1, "temperature": 0, "logit_bias": [[any_token, 1000.0]]}
        found = self.ask("/completion", prompt=ids, n_probs=300, cache_prompt=False, **settings)[
            "completion_probabilities"
        ][0]["top_logprobs"]
        return np.array([x["logprob"] for x in sorted(found, key=lambda x: x["id"])])


@pytest.mark.parametrize("fields", llamas.KINDS)
def test_llama_cpp_computes_our_logits_and_ids(fields, tmp_path):
    specialist = llamas.specialist(tmp_path, **fields)
    specialist.save(tmp_path / "out", format="gguf")
    llama_cpp = LlamaCpp(tmp_path / "out" / "model.gguf")
    for text in llamas.TEXTS:
        ids = llama_cpp.ask("/tokenize", content=text, add_special=True, parse_special=False)
        assert ids["tokens"] == [0, *specialist.tokenizer.encode(text)]
    ids = [0, *np.random.default_rng(0).integers(1, 300, 40).tolist()]
    logits = jax.jit(specialist.model.logits)(specialist.params, np.array([ids]))[0]
    expected = np.asarray(jax.nn.log_softmax(logits))
    (any_token,) = specialist.tokenizer.encode("a")
    for length in (1, 2, 17, 40):
        found = llama_cpp.log_probs(ids[:length], any_token=any_token)
        np.testing.assert_allclose(found, expected[length - 1], atol=1e-5)
