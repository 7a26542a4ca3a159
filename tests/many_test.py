"""Many specialists from one YAML file: what is made, what goes on where it was, what is refused."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from soup_jax.cli import main
from soup_jax.errors import UserError
from soup_jax.specialists import many
from soup_jax.specialists.entries import read_entries
from soup_jax.specialists.open import load
from soup_jax.specialists.pack import pack
from soup_jax.specialists.specialist import Specialist

RECIPE = """
defaults: {{method: histogram}}
specialists:
  cooking: {{documents: "{text}/cooking.jsonl"}}
  python: {{documents: ["{text}/python.jsonl", "{text}/cooking.jsonl"], formats: [hf]}}
  topic: {{text: butter and flour and sugar}}
  by_hand: {{h: {{1: 1, 4: 3}}}}
  listed: {{h: [1, 0, 0, 0, 0, 1], without: [5]}}
  blended: {{blend: {{cooking: 1, by_hand: 3}}}}
  numbers: {{alpha: [0.5, -0.25, 0, 1]}}
"""


@pytest.fixture(scope="module")
def made(tiny_run, tiny_text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    (folder / "many.yaml").write_text(RECIPE.format(text=tiny_text))
    lines = many.instantiate_many(tiny_run, folder / "many.yaml", folder / "out")
    return folder, {line["name"]: line for line in lines}


def _h(folder: pathlib.Path, name: str) -> np.ndarray:
    return Specialist.load(folder / "out" / name).h_K


def test_each_is_what_it_would_be_alone(made, tiny_run, tiny_text):
    folder, lines = made
    soup = load(tiny_run)
    texts = [json.loads(x)["text"] for x in (tiny_text / "cooking.jsonl").read_text().splitlines()]
    for name, expected in (
        ("cooking", soup.instantiate(texts)),
        ("topic", soup.instantiate(["butter and flour and sugar"])),
        ("by_hand", soup.at([0, 0.25, 0, 0, 0.75, 0])),
        ("listed", soup.at([1, 0, 0, 0, 0, 0])),
        ("blended", soup.at(0.25 * _h(folder, "cooking") + 0.75 * _h(folder, "by_hand"))),
    ):
        found = Specialist.load(folder / "out" / name)
        np.testing.assert_allclose(found.h_K, expected.h_K)
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    numbers = Specialist.load(folder / "out" / "numbers")
    np.testing.assert_array_equal(numbers.alpha_E, np.float32([0.5, -0.25, 0, 1]))
    assert (folder / "out" / "python-hf" / "config.json").exists()
    assert lines["python"]["documents"] == 60
    assert lines["cooking"]["loss"] is not None
    assert lines["by_hand"]["loss"] is None


def test_losses_are_those_of_score(made, tiny_run, tiny_text):
    folder, lines = made
    texts = [json.loads(x)["text"] for x in (tiny_text / "cooking.jsonl").read_text().splitlines()]
    from soup_jax.evaluation.score import total

    specialist = Specialist.load(folder / "out" / "cooking")
    ends = np.cumsum([len(specialist.tokenizer.encode(text)) for text in texts])
    texts = texts[: (ends < many._SCORED_TOKENS).sum() + 1]
    alone = total(specialist.score(texts)).loss
    assert lines["cooking"]["loss"] == pytest.approx(alone)
    generic = total(load(tiny_run).generic().score(texts)).loss
    assert lines["cooking"]["generic"] == pytest.approx(generic)
    assert generic != alone


def test_what_is_there_stays_and_the_rest_is_made(tiny_run, tiny_text, tmp_path, monkeypatch):
    recipe = tmp_path / "many.yaml"
    recipe.write_text(RECIPE.format(text=tiny_text))
    out = tmp_path / "out"
    many.instantiate_many(tiny_run, recipe, out, score=False)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("recipe.json")}
    assert len(before) == 8
    shutil.rmtree(out / "topic")
    recipe.write_text(RECIPE.format(text=tiny_text).replace("4: 3", "4: 2"))
    lines = many.instantiate_many(tiny_run, recipe, out, score=False)
    anew = {"topic", "by_hand", "blended"}
    assert {line["name"] for line in lines if not line["there"]} == anew
    for path, time in before.items():
        assert (path.stat().st_mtime_ns == time) == (path.parent.name not in anew)


def test_a_soup_folder_by_command_without_its_corpus(tiny_run, tiny_text, tmp_path, capsys):
    pack(tiny_run, tmp_path / "soup")
    (tmp_path / "many.yaml").write_text(RECIPE.format(text=tiny_text))
    flags = [f"--run={tmp_path}/soup", f"--recipe={tmp_path}/many.yaml", f"--out={tmp_path}/out"]
    assert main.run(["instantiate", *flags]) == 0
    out = capsys.readouterr().out
    assert "specialists: 7" in out
    assert "trained on them all the same" in out
    assert main.run(["instantiate", *flags, "--noscore"]) == 0
    assert "7 there before" in capsys.readouterr().out


def test_searched_in_a_file(tiny_run, tiny_text, tmp_path, monkeypatch, capsys):
    from soup_jax.specialists import search

    monkeypatch.setattr(search, "STEPS", 6)
    text = "defaults: {method: search}\nspecialists:\n"
    text += f"  a: {{documents: {tiny_text}/cooking.jsonl}}\n"
    text += "  b: {h: [1, 1, 1, 1, 1, 1]}\n  c: {alpha: a/recipe.json}\n"
    (tmp_path / "many.yaml").write_text(text)
    flags = [f"--run={tiny_run}", f"--recipe={tmp_path}/many.yaml", f"--out={tmp_path}/out"]
    assert main.run(["instantiate", *flags]) == 2
    assert "a/recipe.json does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "many.yaml").write_text(text.replace("a/recipe", "out/a/recipe"))
    (tmp_path / "first.yaml").write_text("\n".join(text.splitlines()[:3]))
    assert main.run(["instantiate", flags[0], f"--recipe={tmp_path}/first.yaml", flags[2]]) == 0
    assert main.run(["instantiate", *flags]) == 0
    assert "1 there before" in capsys.readouterr().out
    a, b, c = (Specialist.load(tmp_path / "out" / name) for name in "abc")
    assert a.recipe["search"]["steps"] > 0
    assert "search" not in b.recipe
    np.testing.assert_array_equal(a.alpha_E, c.alpha_E)
    jax.tree.map(np.testing.assert_array_equal, a.params, c.params)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a mapping `specialists`"),
        ("specialists: [a]", "must have a mapping `specialists`"),
        ("specialists: {}", "has 0 specialists"),
        ("specialists: {a: {text: x}}\nmore: 1", "unknown keys more"),
        ("specialists: {a: {text: x, methd: search}}", "a: unknown keys methd"),
        ("specialists: {a: {text: x}, a: {text: y}}", "'a' is given twice"),
        ("specialists: {a: {text: x}, A: {text: y}}", "named 'a', but for case"),
        ("specialists: {a: {}}", "needs exactly one of documents.*; it has none"),
        ("specialists: {a: {text: x, h: [1]}}", "it has text and h"),
        ("specialists: {a/b: {text: x}}", "a name is a folder's"),
        ("specialists: {1: {text: x}}", "quoted if it is a number"),
        ("specialists: {a: {text: x, method: magic}}", "method 'magic' is none of"),
        ("specialists: {a: {text: x, formats: [onnx]}}", "unknown format 'onnx'"),
        ("specialists: {a: {text: x, without: [x]}}", "without must be a list of int"),
        ("specialists: {a: {alpha: [1], without: [0]}}", "alpha has none"),
        ("specialists: {a: {blend: {b: 1}}}", "'b' is no other specialist"),
        ("specialists: {a: {blend: {a: 1}}}", "'a' is no other specialist"),
        ("specialists: {b: {text: x}, a: {blend: {b: -1}}}", "weights above 0"),
        ("specialists: {a: {documents: az://b/x}}", "az://"),
        ("specialists: {a: [", "is not valid YAML"),
        ("specialists: &x {a: {text: x}}\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.system [ls]", "is not valid YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused(text, message, tmp_path):
    (tmp_path / "many.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_entries(tmp_path / "many.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {h: [1, 2]}", "a: h must be 6 weights"),
        ("a: {h: {6: 1}}", "domains .0 to 5"),
        ("a: {h: {-1: 1}}", "domains .0 to 5"),
        ("a: {h: {0: .nan}}", "a: h must be 6 weights"),
        ("a: {h: nowhere.json}", "nowhere.json does not exist"),
        ("a: {alpha: [1, 2]}", "a: alpha must be 4 finite numbers"),
        ("a: {alpha: x}", "does not exist"),
        ("a: {h: {0: 1}, without: [0]}", "all domains that have weight are left out"),
        ("a: {h: {0: 1}, without: [9]}", "without: domains are 0 to 5"),
        ("a: {documents: nowhere.jsonl}", "a: .*nowhere.jsonl"),
        ("b: {alpha: [0, 0, 0, 1]}\n  a: {blend: {b: 1}}", "no domain weights"),
    ],
)
def test_what_does_not_fit_the_soup_is_refused_before_work(text, message, tiny_run, tmp_path):
    (tmp_path / "many.yaml").write_text(f"specialists:\n  good: {{text: x}}\n  {text}\n")
    with pytest.raises(UserError, match=message):
        many.instantiate_many(tiny_run, tmp_path / "many.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_folders_are_not_replaced(tiny_run, tmp_path):
    (tmp_path / "many.yaml").write_text("specialists: {a: {text: x}}")
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a specialist"):
        many.instantiate_many(tiny_run, tmp_path / "many.yaml", tmp_path / "out")
