"""`import soup_jax` is instant, its names are what they should be, and docs/python.md runs."""

import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import tiny_config

import soup_jax
from soup_jax.experiments import quickstart

DOCS = (pathlib.Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", DOCS, re.M | re.S)


def test_importing_the_package_imports_no_other():
    program = (
        "import sys, soup_jax; dir(soup_jax); "
        "print([m for m in ('jax', 'numpy', 'flax', 'ml_collections') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_name_is_there_and_no_other():
    assert set(soup_jax.__all__) <= set(dir(soup_jax))
    for name in soup_jax.__all__:
        assert getattr(soup_jax, name) is getattr(soup_jax, name)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        soup_jax.lode  # noqa: B018


@pytest.fixture(scope="module")
def namespace(tiny_run, tiny_corpus, tiny_text, tmp_path_factory):
    """What docs/python.md leaves when its blocks ran, on the runs and texts of the tests."""
    folder, found = tmp_path_factory.mktemp("docs"), {}
    source = "\n".join(BLOCKS)
    source = source.replace("runs/quickstart/soup", str(tiny_run))
    source = source.replace("text/cooking", str(tiny_text / "cooking"))
    fields = {"corpus.dir": tiny_corpus, "corpus.sources": (str(tiny_text / "generic.jsonl"),)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fields |= {"num_steps": 2, "optimizer.warmup_steps": 1}
        patch.setattr(quickstart, "get_config", lambda _: tiny_config(**fields))
        exec(compile(source, "python.md", "exec"), found)
    return {**found, "folder": folder}


def test_documented_training_and_evaluation(namespace):
    assert int(namespace["state"].step) == 2
    average = namespace["result"]["average"]
    assert set(average) == {"specialist", "generic_h", "shared"}


def test_documented_specialist(namespace):
    soup, specialist, same = (namespace[name] for name in ("soup", "specialist", "same"))
    assert (soup.num_experts, soup.num_domains, soup.step) == (4, 6, 12)
    assert len(soup.domains) == 6
    assert soup.config.num_experts == 4
    np.testing.assert_allclose(specialist.h_K.sum(), 1)
    np.testing.assert_array_equal(specialist.h_K, same.h_K)
    np.testing.assert_array_equal(specialist.alpha_E, same.alpha_E)
    jax.tree.map(np.testing.assert_array_equal, specialist.params, same.params)
    assert namespace["logits"].shape == (1, 3, 400)
    settings = {"max_tokens": 8, "seed": 3}
    assert specialist.generate("def", **settings) == same.generate("def", **settings)


def test_domain_weights_and_documents_give_the_same_specialist(namespace):
    soup, specialist = namespace["soup"], namespace["specialist"]
    again = soup.at(specialist.h_K)
    jax.tree.map(np.testing.assert_array_equal, again.params, specialist.params)
    assert again.histogram is None
    for wrong in ([1.0], np.full(6, 0.5), [2.0, -1.0, 0, 0, 0, 0]):
        with pytest.raises(soup_jax.UserError, match="6 weights of at least 0 that add up to 1"):
            soup.at(wrong)


def test_documented_exporter_is_named_by_a_dotted_path(namespace, tmp_path, monkeypatch):
    block = next(
        b for b in re.findall(r"^```python\n(.*?)^```$", DOCS, re.M | re.S) if "savez" in b
    )
    (tmp_path / "my_formats.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    specialist = namespace["specialist"]
    specialist.save("arrays", format="my_formats:arrays")
    assert {p.name for p in (tmp_path / "arrays").iterdir()} == {"params.npz", "recipe.json"}
    specialist.save("arrays")  # in another format
    assert (tmp_path / "arrays" / "params.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(soup_jax.UserError, match="unknown format 'soup_jx'"):
        specialist.save("arrays", format="soup_jx")


def test_a_save_that_fails_leaves_what_was_there(namespace, tmp_path, monkeypatch):
    specialist, out = namespace["specialist"], tmp_path / "out"
    specialist.save(out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("soup_jax.specialists.export.folder.files.write_json", full)
    for folder in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            specialist.save(folder)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_documented_network_can_be_made(namespace):
    settings = soup_jax.ModelSettings(
        vocab_size=300, seq_len=8, num_layers=1, dim=8, num_heads=2, num_kv_heads=2, hidden_dim=8
    )
    model = namespace["make"](settings)
    params = model.init(jax.random.key(0))
    assert model.logits(params, np.zeros((2, 8), np.int32)).shape == (2, 8, 300)
