"""Instantiation: the merged parameters, the folder they are saved in, and what is refused."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from soup_jax import inputs, tree
from soup_jax.cli import main
from soup_jax.data.corpus import fingerprint_of, open_corpus
from soup_jax.errors import UserError
from soup_jax.evaluation.sample import read_sample
from soup_jax.specialists import open as open_lib
from soup_jax.specialists.instantiate import instantiate_to
from soup_jax.specialists.specialist import Specialist

FILES = {"params.safetensors", "recipe.json", "tokenizer.json"}


@pytest.fixture(scope="module")
def documents(tiny_text) -> str:
    return str(tiny_text / "cooking.jsonl")


@pytest.fixture(scope="module")
def made(tiny_run, documents, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("made") / "cooking"
    instantiate_to(tiny_run, documents, out)
    return out


def _load(folder: pathlib.Path):
    found = Specialist.load(folder)
    return found.params, found.recipe


def _bytes(folder: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def _params(run: open_lib.Soup) -> dict[str, dict[str, np.ndarray]]:
    return {k: tree.flatten(jax.device_get(v)) for k, v in run.params.items()}


def test_folder_holds_three_files_and_the_recipe_describes_them(made, tiny_run, tiny_corpus):
    assert {p.name for p in made.iterdir()} == FILES
    recipe = json.loads((made / "recipe.json").read_text())
    corpus = open_corpus(tiny_corpus)
    assert len(recipe["h"]) == 6
    np.testing.assert_allclose(sum(recipe["h"]), 1)
    assert len(recipe["alpha"]) == 4
    assert recipe["domains"] == [corpus.label(k) for k in range(6)]
    assert recipe["num_documents"] == 30
    assert recipe["step"] == 12
    assert recipe["hashes"] == {
        "corpus": corpus.fingerprint,
        "config": inputs.sha256_file(tiny_run / "config.json"),
        "tokenizer": inputs.sha256_file(made / "tokenizer.json"),
        "params": inputs.sha256_file(made / "params.safetensors"),
    }
    assert (made / "tokenizer.json").read_bytes() == (corpus.path / "tokenizer.json").read_bytes()


def test_saved_parameters_are_shared_plus_weighted_experts(made, trained):
    recipe = json.loads((made / "recipe.json").read_text())
    alpha = np.asarray(recipe["alpha"])
    assert np.abs(alpha).max() > 0
    parts = _params(trained)
    saved = load_file(made / "params.safetensors")
    dense = parts["bank"]
    assert all(path.startswith("dense/") for path in dense)
    assert set(saved) == set(parts["shared"])
    for path, leaf in parts["shared"].items():
        expected = leaf.astype(np.float64)
        experts = dense[f"dense/{path}"].astype(np.float64)
        expected = expected + np.tensordot(alpha, experts, 1)
        assert saved[path].dtype == leaf.dtype
        np.testing.assert_allclose(saved[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_load_gives_what_was_saved(made):
    params, recipe = _load(made)
    saved = load_file(made / "params.safetensors")
    assert set(tree.flatten(params)) == set(saved)
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(leaf, saved[path])
    assert json.loads(json.dumps(recipe)) == json.loads((made / "recipe.json").read_text())


def test_changed_parameters_are_refused(made, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(made, folder)
    leaves = load_file(folder / "params.safetensors")
    name = next(iter(leaves))
    leaves[name] = leaves[name] + 1
    save_file(leaves, folder / "params.safetensors")
    with pytest.raises(UserError, match="make it again"):
        _load(folder)


def unsealed(folder, change=lambda recipe: None):
    """The recipe changed, without a seal, as those of the first version were, and with the hash of
    the parameters that are there."""
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["hashes"]["params"] = inputs.sha256_file(folder / "params.safetensors")
    change(recipe)
    del recipe["seal"]
    (folder / "recipe.json").write_text(json.dumps(recipe))


def _fill(folder, value):
    leaves = load_file(folder / "params.safetensors")
    save_file({**leaves, "embedding": np.full_like(leaves["embedding"], value)}, folder / "p")
    (folder / "p").rename(folder / "params.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: unsealed(f, lambda r: r["model"].update(dim=64)),
            r"embedding is \(400, 32\), expected \(400, 64\)",
        ),
        (lambda f: unsealed(f, lambda r: r["model"].update(num_layers=9)), r"expected \(9, 32"),
        (
            lambda f: unsealed(f, lambda r: r["model"].update(kind="os:system")),
            "'os:system' takes no ModelSettings",
        ),
        (
            lambda f: unsealed(f, lambda r: r["model"].update(args=["a"])),
            "must be pairs",
        ),
        (lambda f: (_fill(f, np.nan), unsealed(f)), r"are not finite \(embedding\)"),
        (
            lambda f: ((f / "params.safetensors").write_bytes(b"junk" * 9), unsealed(f)),
            "no safetensors file, or damaged",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(change, message, made, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(made, folder)
    change(folder)
    with pytest.raises(UserError, match=message):
        _load(folder)


def test_changed_tokenizer_is_refused(made, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(made, folder)
    with (folder / "tokenizer.json").open("a") as f:
        f.write("\n")
    with pytest.raises(UserError, match=r"tokenizer\.json .*make it again"):
        _load(folder)


@pytest.mark.parametrize("name", ["params.safetensors", "recipe.json", "tokenizer.json"])
def test_missing_file_is_refused(made, tmp_path, name):
    folder = tmp_path / "incomplete"
    shutil.copytree(made, folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        _load(folder)


def test_twice_the_same_is_the_same_bytes(made, tiny_run, documents, tmp_path):
    instantiate_to(tiny_run, documents, tmp_path / "again")
    assert _bytes(tmp_path / "again") == _bytes(made)


def test_other_documents_give_another_specialist(made, tiny_run, tiny_text, tmp_path):
    _, nearest = instantiate_to(tiny_run, str(tiny_text / "python.jsonl"), tmp_path)
    _, cooking = _load(made)
    _, python = _load(tmp_path)
    assert cooking["h"] != python["h"]
    assert cooking["alpha"] != python["alpha"]
    weights = dict(zip(python["domains"], python["h"]))
    assert nearest
    assert all(weights[label] == weight for label, weight in nearest)


def test_several_files_are_one_specialist_and_what_was_read_is_said(
    tiny_run, tiny_text, made, tmp_path, caplog
):
    lines = (tiny_text / "cooking.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join([*lines[:10], *lines[:5]]))
    (tmp_path / "b.jsonl").write_text("".join(lines[10:]))
    (tmp_path / "c.txt").write_text(json.loads(lines[0])["text"])
    said: list[str] = []
    sources = [str(tmp_path / "*.jsonl"), str(tmp_path / "c.txt")]
    instantiate_to(tiny_run, sources, tmp_path / "out", say=said.append)
    assert said == [
        f"from step 12 of {tiny_run}",
        f"read {tmp_path}/a.jsonl: 15 documents",
        f"read {tmp_path}/b.jsonl: 20 documents",
        f"read {tmp_path}/c.txt: 1 document",
        "one specialist of 3 files",
        "6 exact duplicates dropped",
        "searching holds about 2 MB of arrays, beside the program and its code",
    ]
    assert not caplog.messages  # of orbax neither
    assert _bytes(tmp_path / "out") == _bytes(made)
    command = ["instantiate", f"--run={tiny_run}", f"--out={tmp_path / 'other'}"]
    assert main.run([*command, *(f"--documents={source}" for source in sources)]) == 0
    assert _bytes(tmp_path / "other") == _bytes(made)


def test_one_long_document_is_doubted(tmp_path):
    (tmp_path / "a.txt").write_text("a paragraph of words\n\n" * 1000)
    sample = read_sample([str(tmp_path / "a.txt")], text_field="text")
    assert "is one document of 22,000 characters" in sample.warnings()[0]
    assert ".jsonl" in sample.warnings()[0]
    (tmp_path / "a.txt").write_text("a short one")
    assert not read_sample([str(tmp_path / "a.txt")], text_field="text").warnings()


def test_many_files_are_not_all_listed(tmp_path):
    for i in range(25):
        (tmp_path / f"{i:02d}.txt").write_text(f"document {i}")
    summary = read_sample([str(tmp_path)], text_field="text").summary()
    assert len(summary) == 12
    assert summary[-2:] == ["read 15 more files: 15 documents", "one specialist of 25 files"]


@pytest.fixture
def moved(tiny_run, tiny_corpus, tmp_path) -> tuple[pathlib.Path, pathlib.Path]:
    """A copy of the run, without what an earlier version would not have kept of the corpus, whose
    corpus was moved and whose checkpoints lost their optimizer state."""
    run, corpus = tmp_path / "run", tmp_path / "moved_corpus"
    shutil.copytree(tiny_run, run)
    shutil.copytree(tiny_corpus, corpus)
    config = json.loads((run / "config.json").read_text())
    config["corpus"]["dir"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    removed = [*run.glob("checkpoints/*/opt_state"), run / "domains"]
    assert len(removed) > 1
    for folder in removed:
        shutil.rmtree(folder)
    return run, corpus


def test_moved_corpus_and_no_optimizer_state(made, moved, documents, tmp_path):
    run, corpus = moved
    with pytest.raises(UserError, match="gone"):
        instantiate_to(run, documents, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    instantiate_to(run, documents, tmp_path / "out", corpus_dir=str(corpus))
    for name in ("params.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (made / name).read_bytes()


def test_another_corpus_is_refused(moved, documents, tmp_path):
    run, corpus = moved
    manifest = json.loads((corpus / "manifest.json").read_text())
    words = corpus / "domains.json"
    words.write_text(words.read_text().replace("}", "} ", 1))
    entry = {"bytes": words.stat().st_size, "sha256": inputs.sha256_file(words)}
    manifest["artefacts"]["domains.json"] = entry
    manifest["fingerprint"] = fingerprint_of(manifest)
    del manifest["seal"]
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="trained on another corpus"):
        instantiate_to(run, documents, tmp_path / "out", corpus_dir=str(corpus))


def test_a_step_that_is_not_the_newest_is_said(tiny_run, documents, tmp_path):
    run, said = tmp_path / "run", []
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "checkpoints" / "12" / "params")
    instantiate_to(run, documents, tmp_path / "out", say=said.append)
    assert said[0] == f"from step 10 of {run} (its newest checkpoint is step 12)"


def test_an_earlier_step_can_be_taken(tiny_run, documents, made, tmp_path):
    instantiate_to(tiny_run, documents, tmp_path / "early", step=10)
    params, recipe = _load(tmp_path / "early")
    last, _ = _load(made)
    assert recipe["step"] == 10
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(last))
    assert any((a != b).any() for a, b in pairs)
    with pytest.raises(UserError, match="step 7"):
        open_lib.load(tiny_run, step=7)


def test_run_without_experts_gives_its_shared_parameters(generic_run, documents, tmp_path):
    made, _ = instantiate_to(generic_run, documents, tmp_path / "generic")
    assert made.alpha_E.shape == (0,)
    params, recipe = _load(tmp_path / "generic")
    assert recipe["alpha"] == []
    shared = _params(open_lib.load(generic_run))["shared"]
    found = tree.flatten(params)
    assert set(found) == set(shared)
    for path, leaf in shared.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_foreign_folder_is_not_overwritten(trained, tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years")
    made = trained.instantiate(["butter flour oven"])
    with pytest.raises(UserError, match="is not a specialist"):
        made.save(tmp_path)
    assert _bytes(tmp_path) == {"thesis.txt": b"ten years"}


def test_file_in_the_place_of_the_folder_is_refused(trained, tmp_path):
    (tmp_path / "out").write_text("a file")
    made = trained.instantiate(["butter flour oven"])
    with pytest.raises(UserError, match="is no folder"):
        made.save(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_a_specialist_is_replaced(made, trained, tiny_text, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(made, folder)
    trained.instantiate(["def return import"]).save(folder)
    _, recipe = _load(folder)
    assert recipe["num_documents"] == 1
    assert {p.name for p in folder.iterdir()} == FILES


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        open_lib.load(tmp_path / "nowhere")


def test_no_documents_are_refused(trained):
    with pytest.raises(UserError, match="no documents"):
        trained.instantiate([])
