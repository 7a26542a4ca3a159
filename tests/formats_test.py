"""Files of other versions: what one lacks, has too much, or cannot be read at all."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import tiny_config

from soup_jax import tree
from soup_jax.config import schema as config
from soup_jax.data.corpus import open_corpus
from soup_jax.data.prepare import provenance
from soup_jax.errors import UserError
from soup_jax.inputs import read_format, read_json
from soup_jax.specialists import recipe as recipe_lib
from soup_jax.specialists.instantiate import instantiate_to
from soup_jax.storage import write_json
from soup_jax.training import formats, setup
from soup_jax.training.checkpoint import Checkpointer


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "config.json"
    config.save(tiny_config(), path)
    return path


def edit(path, change):
    value = read_json(path)
    change(value)
    value.pop("seal", None)  # earlier versions wrote none
    write_json(path, value)


@pytest.fixture
def history(monkeypatch):
    """A schema in which two fields are new, one is gone for good and one has a successor."""
    for name, before in (("optimizer.beta2", 0.99), ("router.init", "random")):
        field = dataclasses.replace(config.FIELDS[name], before=before)
        monkeypatch.setitem(config.FIELDS, name, field)
    monkeypatch.setitem(config.GONE, "optimizer.every", config.was(1))
    monkeypatch.setitem(
        config.GONE, "log.quiet", lambda quiet: {"log.every_steps": 1000 if quiet else 10}
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"format": 3}, r"x has format 3, this version of soup_jax reads formats up to 2: upgrade"),
        ({"format": "new"}, "x has the format 'new', which no version"),
        ({"format": True}, "x has the format True"),
        ([], "x holds no JSON object"),
    ],
)
def test_formats_that_cannot_be_read(value, message):
    with pytest.raises(UserError, match=message):
        read_format(value, "x", newest=2)


def test_the_first_format_had_no_number():
    assert (read_format({}, "x", newest=2), read_format({"format": 2}, "x", newest=2)) == (1, 2)


def test_a_config_without_a_field_has_the_value_from_before_it(saved, history):
    def older(value):
        del value["format"], value["optimizer"]["beta2"], value["router"]

    edit(saved, older)
    cfg = config.load(saved)
    assert (cfg.optimizer.beta2, cfg.router.init) == (0.99, "random")
    assert cfg.router.scale == 1.0  # had no other value before


def test_a_field_that_is_gone_counts_as_what_it_means_today(saved, history):
    edit(saved, lambda value: value["optimizer"].update(every=1))
    edit(saved, lambda value: value["log"].update(quiet=True))
    assert config.load(saved).log.every_steps == 1000
    edit(saved, lambda value: value["optimizer"].update(every=3))
    with pytest.raises(UserError, match=r"another version: the field optimizer\.every = 3 is gone"):
        config.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=3), "format 3"),
        (lambda v: v.update(num_expert=3), r"num_expert = 3 is unknown \(did you mean num_experts"),
        (lambda v: v.update(num_steps="60"), "num_steps = '60' is a str, expected a int"),
        (lambda v: v["optimizer"].update(learning_rate=None), "learning_rate = None is a NoneType"),
        (lambda v: v["experts"].update(rules=3), r"experts\.rules = 3 is a int, expected a tuple"),
        (lambda v: v.update(model=None), "model = None is unknown"),
        (lambda v: v.update(num_mixtures=3), r"config\.json: config: num_mixtures = 3 must divide"),
    ],
)
def test_configs_that_mean_nothing_here_are_refused(saved, change, message):
    edit(saved, change)
    with pytest.raises(UserError, match=message):
        config.load(saved)


def test_a_corpus_that_records_less_or_what_is_gone_is_the_same_corpus(monkeypatch):
    new = provenance.make_request(tiny_config(), [])
    parameters = dict(new["parameters"])
    del parameters["embed.max_chars"]
    parameters["embed.old"] = "plain"
    old = {**new, "parameters": parameters}
    assert provenance.differences(old, new) == ["embed.old: plain, now None"]
    monkeypatch.setitem(config.GONE, "embed.old", config.was("plain"))
    assert provenance.differences(old, new) == []
    other = provenance.make_request(tiny_config(**{"embed.max_chars": 5}), [])
    assert provenance.differences(old, other) == ["embed.max_chars: 20000, now 5"]


def test_a_corpus_of_a_later_version_is_refused(tiny_corpus, tmp_path):
    manifest = read_json(f"{tiny_corpus}/manifest.json")
    write_json(tmp_path / "manifest.json", manifest | {"format": 99})
    with pytest.raises(UserError, match=r"manifest\.json has format 99, .*upgrade it"):
        open_corpus(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=99), "format 99"),
        (lambda v: v["model"].update(num_layer=2), r"model\.num_layer = 2 is unknown .*num_layers"),
        (lambda v: v["model"].update(dim="8"), r"model\.dim = '8' is a str"),
        (lambda v: v.pop("hashes"), "hashes is missing"),
        (lambda v: v["model"].update(num_heads=0), r"model\.num_heads = 0 must be at least 1"),
        (lambda v: v.update(seq_len=0), "seq_len = 0"),
        (lambda v: v.update(eos_id=9999), "eos_id = 9999"),
        (lambda v: v.update(h=[1, 2, 3]), "h, which must add up to 1"),
    ],
)
def test_recipes_that_cannot_be_read(specialist, change, message):
    edit(specialist / "recipe.json", change)
    with pytest.raises(UserError, match=message):
        recipe_lib.read(specialist)


def test_a_recipe_that_was_edited_is_refused_though_it_could_be_read(specialist):
    path = specialist / "recipe.json"
    recipe = json.loads(path.read_text())
    recipe["model"]["rope_theta"] *= 2
    path.write_text(json.dumps(recipe))
    with pytest.raises(UserError, match="changed"):
        recipe_lib.read(specialist)


def test_a_recipe_that_lacks_a_field_has_the_value_from_before_it(specialist):
    expected = recipe_lib.read(specialist)
    edit(specialist / "recipe.json", lambda v: v["model"].pop("attention"))
    del expected["seal"]
    assert recipe_lib.read(specialist) == expected


@pytest.fixture
def specialist(tiny_run, tiny_text, tmp_path):
    instantiate_to(tiny_run, str(tiny_text / "cooking.jsonl"), tmp_path / "made")
    return tmp_path / "made"


def test_a_checkpoint_of_a_later_version_is_refused_not_skipped(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    run = setup.setup(config.load(tmp_path / "run" / "config.json"), tmp_path / "run")
    with Checkpointer(run.workdir / "checkpoints") as reader:
        newest = reader.steps()[-1]
        (path,) = (
            p
            for p in (reader.directory / str(newest) / "data").iterdir()
            if p.is_file() and p.read_text().startswith("{")
        )
        data = json.loads(path.read_text())
        assert data["format"] == 2
        path.write_text(json.dumps(data | {"format": 99}))
        with pytest.raises(UserError, match=rf"checkpoint .*/{newest} has format 99"):
            reader.restore(run.abstract)


def test_a_state_in_the_first_format_comes_back_the_same():
    """With both kinds of experts, and with each alone; arrays are the same objects."""
    dense = {"layers": {"up": np.zeros(3)}}
    factors = {"layers": {"query": {"left": np.ones(2), "right": np.ones(4)}}}
    for bank in ({"dense": dense, "low_rank": factors}, {"dense": dense}, {"low_rank": factors}):
        state = {"dense": {"nu": {"layers": {"up": np.full(1, 2.0)}}}, "low_rank": (np.ones(5),)}
        params = {"shared": {"w": np.zeros(1)}, "bank": bank, "router": {}}
        items = {
            "params": params,
            "opt_state": {"base": {}, "bank": {kind: state[kind] for kind in bank}},
        }
        old = formats.to_v1(items)
        leaves = {"layers/up"} if "dense" in bank else set()
        leaves |= {"layers/query/left", "layers/query/right"} if "low_rank" in bank else set()
        assert set(tree.flatten(old["params"]["bank"])) == leaves
        assert ("factors" in old["opt_state"]["bank"]) == ("low_rank" in bank)
        for given, wanted in ((items, old), ({"params": params}, {"params": old["params"]})):
            back = formats.from_v1(wanted, like=given)
            assert jax.tree.structure(back) == jax.tree.structure(given)
            assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(given)))
