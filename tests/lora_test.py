"""Adapters from low-rank experts: on the exported shared parameters they are the specialist."""

import json

import jax
import llamas
import numpy as np
import pytest
from conftest import tiny_config
from safetensors.numpy import load_file

from soup_jax import tree
from soup_jax.cli import main
from soup_jax.data.corpus import open_corpus
from soup_jax.errors import UserError
from soup_jax.specialists import lora
from soup_jax.specialists.open import load
from soup_jax.specialists.verify import verify
from soup_jax.training import setup as run_lib
from soup_jax.training.checkpoint import Checkpointer

RULES = (("layers/attention/.*", "low_rank:2"), (".*/(gate|down)", "low_rank:3"), (".*", "none"))


@pytest.fixture(scope="module")
def run(tiny_corpus, tmp_path_factory):
    """The folder of a run with random parameters and low-rank experts: init compiles for long."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    started = run_lib.setup(
        tiny_config(**{"corpus.dir": tiny_corpus, "experts.rules": RULES}), folder
    )
    with started.lock:
        run_lib.claim_workdir(started)
        rng = np.random.default_rng(0)
        state = jax.tree.map(
            lambda x: jax.device_put(rng.normal(0.1, 0.2, x.shape).astype(x.dtype), x.sharding),
            started.abstract,
        )
        with Checkpointer(folder / "checkpoints", started.cfg) as checkpointer:
            checkpointer.save(state, started.data_state(5))
    return folder


@pytest.fixture(scope="module")
def soup(run):
    return load(run)


@pytest.fixture(scope="module")
def specialist(soup):
    return soup.at([0.5, 0.5, 0, 0, 0, 0])


@pytest.fixture(scope="module")
def exported(run, soup, specialist, tmp_path_factory):
    """(base, adapter), by the commands of the documentation."""
    folder = tmp_path_factory.mktemp("exported")
    specialist.save(folder / "specialist")
    base, adapter = str(folder / "base"), str(folder / "adapter")
    assert main.run(["export", f"--run={run}", f"--out={base}"]) == 0
    command = ["export", f"--model={folder / 'specialist'}", "--format=lora"]
    assert main.run([*command, f"--base={base}", f"--out={adapter}"]) == 0
    return folder / "base", folder / "adapter"


def test_shared_plus_the_adapter_is_the_specialist(specialist, exported):
    base, adapter = exported
    tensors = load_file(base / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (12, 12)  # 4 experts of rank 3
    assert config["base_model_name_or_path"] == str(base)
    low = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == low
    assert config["target_modules"] == sorted([*low, "gate_proj", "down_proj"])
    for name in [n for n in factors if "lora_A" in n]:
        product = factors[name.replace("lora_A", "lora_B")] @ factors[name]
        module = name.removeprefix("base_model.model.").replace("lora_A.", "")
        assert np.abs(product).max() > 0.01
        tensors[module] = tensors[module] + product
    ids = [0, *np.random.default_rng(0).integers(0, 400, 20).tolist()]
    config = json.loads((base / "config.json").read_text())
    logits = jax.jit(specialist.model.logits)(specialist.params, np.array([ids]))[0]
    expected = llamas.numpy_logits(tensors, config, ids)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    assert "exported as lora" in verify(adapter)[0]
    assert "the shared parameters, without experts" in (base / "README.md").read_text()


def test_peft_computes_the_specialist(specialist, exported):
    peft = pytest.importorskip("peft")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    base, adapter = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, adapter)
    rows = np.random.default_rng(0).integers(0, 400, (3, 32))
    with torch.no_grad():
        found = model(torch.tensor(rows)).logits.numpy()
    expected = np.asarray(jax.jit(specialist.model.logits)(specialist.params, rows))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_what_has_no_adapter_is_refused(specialist, soup, tiny_corpus, tmp_path):
    dense = {"dense": {"head": np.zeros((2, 3, 3))}}
    for bank, what in ((dense, "dense"), ({}, "none")):
        with pytest.raises(UserError, match=f"this soup's are {what}: export as 'hf'"):
            lora.factors_of(bank, np.ones(2))
    with pytest.raises(UserError, match="experts of the leaf 'embedding'"):
        lora.adapter(None, {"embedding": (np.zeros((4, 2)), np.zeros((2, 4)))})
    other = soup.at(open_corpus(tiny_corpus).domain_frequencies)
    other.recipe["alpha"][0] += 1.0
    with pytest.raises(UserError, match=r"is none of .* at step 5: layers/.* differs"):
        other.save(tmp_path / "out", format="lora")
    with pytest.raises(UserError, match="nowhere is not a run"):
        specialist.save(tmp_path / "out", format="lora", run="nowhere")
    assert not (tmp_path / "out").exists()


def test_shared_is_s(soup):
    found, expected = (tree.flatten(x) for x in (soup.shared().params, soup.params["shared"]))
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)
