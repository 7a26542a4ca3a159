"""The soup as an oracle of mixtures: h that predicts the target, a floor that is kept, a file."""

import dataclasses
import json
import shlex
import shutil

import numpy as np
import pytest
from conftest import tiny_config

import soup_jax
from soup_jax.cli import main
from soup_jax.data.components import from_file
from soup_jax.errors import DamagedError, UserError
from soup_jax.evaluation import sets
from soup_jax.evaluation.evaluator import Evaluator
from soup_jax.specialists import mixture as mixture_lib
from soup_jax.specialists import search as search_lib
from soup_jax.specialists.finetune import held_back
from soup_jax.specialists.open import load

GENERIC_CONFIG = """
from conftest import tiny_config
from soup_jax.experiments import base

def get_config(method):
    assert method == "generic"
    cfg = tiny_config(**{fields!r})
    base.set_generic(cfg)
    return cfg
"""


@pytest.fixture(scope="module")
def scorer(trained):
    """(h_K, windows) -> the loss that `evaluate` gives."""
    evaluator = Evaluator(trained.config, trained.model, trained.mesh, batch_size=8)
    params = trained.params
    vars(trained).pop("params")  # the others read it from disk

    def loss(h_K, windows):
        return evaluator.loss(evaluator.at(params, h_K), windows)["loss"]

    return loss


@pytest.fixture
def from_afar(monkeypatch):
    """The search begins at equal weights, where there is much to find, and takes few steps."""
    monkeypatch.setattr(search_lib, "STEPS", 6)
    real = mixture_lib.document_histogram

    def equal(domains, texts):
        return dataclasses.replace(real(domains, texts), h_K=np.full(6, 1 / 6))

    monkeypatch.setattr(mixture_lib, "document_histogram", equal)


def _natural(trained):
    return trained.map.domain_frequencies


def test_documents_that_nothing_saw_are_predicted_better(trained, texts, scorer, from_afar):
    fitted, held = held_back(texts)
    found = mixture_lib.find_mixture(trained, texts)
    assert (found.histogram.num_documents, found.num_held) == (len(fitted), len(held))
    assert found.h_K.shape == (6,)
    assert found.h_K.sum() == pytest.approx(1, abs=1e-9)
    assert found.search.steps > 0
    assert found.losses.keys() == {"target"}
    losses = found.losses["target"]
    assert losses["found"] < losses["histogram"] - 0.005
    assert (found.t, losses["mixture"]) == (1, losses["found"])
    assert np.abs(found.h_K - 1 / 6).sum() > 0.1
    # They are the losses of these documents, at these weights.
    windows = sets.pack(
        trained.map.tokenizer(), held, eos_id=trained.map.eos_id, seq_len=32, max_windows=8
    )
    for name, h_K in (
        ("generic_h", _natural(trained)),
        ("histogram", np.full(6, 1 / 6)),
        ("mixture", found.h_K),
    ):
        assert losses[name] == pytest.approx(scorer(h_K, windows), rel=1e-5), name


def test_where_nothing_is_surely_better_the_histogram_stays(trained, texts, monkeypatch):
    monkeypatch.setattr(search_lib, "STEPS", 3)
    monkeypatch.setattr(search_lib, "H_LEARNING_RATE", -5.0)  # up the loss
    found = mixture_lib.find_mixture(trained, texts)
    assert found.search.steps == 0
    np.testing.assert_allclose(found.h_K, found.histogram.h_K, rtol=1e-12)
    assert "0 steps: nothing was surely better" in mixture_lib.losses_table(found)


def test_the_floor_is_kept_and_no_further_than_needed(trained, texts, scorer, monkeypatch):
    windows, natural_K = sets.validation_set(trained.corpus, max_windows=8), _natural(trained)
    natural = scorer(natural_K, windows)
    there, k = max((scorer(np.eye(6)[k], windows), k) for k in range(6))
    assert there > natural + 0.001, "the fixture has no trade-off"
    worst = search_lib.Found(np.zeros(4), np.eye(6)[k], 3, 6.0, 5.0)
    monkeypatch.setattr(mixture_lib.Soup, "find", lambda *_: (None, None, [worst]))
    within = 0.4 * (there / natural - 1)
    found = mixture_lib.find_mixture(trained, texts, generic_within=within)
    assert 0 < found.t < 1
    np.testing.assert_allclose(found.h_K, (1 - found.t) * natural_K + found.t * worst.h_K)
    most, slack = natural * (1 + within), 1e-5
    assert scorer(found.h_K, windows) <= most + slack
    further = found.t + 1 / 64
    assert scorer((1 - further) * natural_K + further * worst.h_K, windows) > most - slack
    losses = found.losses["validation"]
    assert losses["generic_h"] == pytest.approx(natural, rel=1e-5)
    assert losses["found"] == pytest.approx(there, rel=1e-5)
    assert natural < losses["mixture"] <= most + slack
    # A floor that is no hindrance changes nothing.
    loose = mixture_lib.find_mixture(trained, texts, generic_within=2 * (there / natural - 1))
    assert loose.t == 1
    np.testing.assert_array_equal(loose.h_K, worst.h_K)


@pytest.mark.parametrize(("end", "t"), [(1.0, 1.0), (0.3, 19 / 64), (0.99, 63 / 64), (0.0, 0.0)])
def test_six_halvings(end, t):
    asked = []
    assert mixture_lib._furthest(lambda x: asked.append(x) or x <= end) == t
    assert len(asked) <= 7


def test_a_domain_without_windows_gets_no_weight(trained, texts, tmp_path, monkeypatch):
    frequencies_K = np.array([0.3, 0.3, 0.0, 0.2, 0.1, 0.1])
    domains = dataclasses.replace(trained.map, domain_frequencies=frequencies_K)
    little = search_lib.Found(np.zeros(4), np.array([0.5, 0.4, 0.1, 0, 0, 0]), 3, 6.0, 5.0)
    monkeypatch.setattr(mixture_lib.Soup, "find", lambda *_: (None, None, [little]))
    found = mixture_lib.find_mixture(dataclasses.replace(trained, map=domains), texts)
    np.testing.assert_allclose(found.h_K, np.array([5, 4, 0, 0, 0, 0]) / 9)
    (tmp_path / "h.json").write_text(json.dumps(found.h_K.tolist()))
    assert from_file(frequencies_K, path=str(tmp_path / "h.json"))


def test_small_domains_with_most_of_the_weight_are_warned_of(trained, monkeypatch):
    windows_K = np.array([entry["windows"]["train"] for entry in trained.map.domains])
    one_K, mixed_K = np.eye(6)[1], np.array([0.5, 0.5, 0, 0, 0, 0])
    times_K = mixture_lib.epochs(trained, one_K)
    np.testing.assert_allclose(times_K, one_K * 12 * 16 / windows_K)  # as its run was, not as here
    assert times_K.max() <= 10
    assert mixture_lib.repetition_warning(trained, one_K) == ""
    long = tiny_config(num_steps=int(15 * windows_K[1]), batch_size=1, num_mixtures=1)
    monkeypatch.setattr(mixture_lib.config_lib, "load", lambda _: long)
    warning = mixture_lib.repetition_warning(trained, one_K)
    assert warning.startswith("100% of the weights lie on small domains: 1 of 6 domains")
    assert f"{trained.map.label(1)} (15 times)" in warning
    assert mixture_lib.epochs(trained, mixed_K)[1] == pytest.approx(7.5)
    assert mixture_lib.repetition_warning(trained, mixed_K) == ""
    # A smaller part of the weights is told, too; of a small one nothing is.
    monkeypatch.setattr(mixture_lib, "epochs", lambda *_: np.array([1.0, 20, 1, 1, 1, 1]))
    for share in (0.2, 0.09):
        h_K = np.array([1 - share, share, 0, 0, 0, 0])
        assert bool(mixture_lib.repetition_warning(trained, h_K)) == (share > 0.1)


def test_a_damaged_checkpoint_is_left_for_an_earlier_one(trained, texts, monkeypatch):
    real, tried = mixture_lib.Soup.find, []

    def find(self, *arguments):
        tried.append(self.step)
        if len(tried) == 1:
            raise DamagedError("damaged")
        return real(self, *arguments)

    monkeypatch.setattr(search_lib, "STEPS", 0)
    monkeypatch.setattr(mixture_lib.Soup, "find", find)
    mixture_lib.find_mixture(trained, texts)
    assert tried == [12, 10]


def test_by_command_and_a_model_that_is_trained_on_it(
    trained, tiny_text, tiny_corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(search_lib, "STEPS", 3)
    lines = (tiny_text / "cooking.jsonl").read_text().splitlines(keepends=True)
    for i in range(2):
        (tmp_path / f"target{i}.jsonl").write_text("".join(lines[i::2]))
    out = tmp_path / "h.json"
    command = ["mix", f"--run={trained.workdir}", f"--target={tmp_path}/target0.jsonl"]
    command += [f"--target={tmp_path}/target1.*", f"--out={out}", "--most=3"]
    assert main.run([*command, "--generic_within=0"]) == 0
    printed = capsys.readouterr().out
    h_K = np.array(json.loads(out.read_text()))
    found = soup_jax.find_mixture(
        trained, [json.loads(line)["text"] for line in lines[::2] + lines[1::2]], generic_within=0
    )
    np.testing.assert_allclose(h_K, found.h_K, rtol=1e-6)
    for words in (
        f"from step 12 of {trained.workdir}",
        f"read {tmp_path}/target0.jsonl: 15 documents",
        "domain       h  histogram  corpus   times  label",
        f"{h_K.argmax():>6}  {h_K.max():>6.1%}",
        "3 more",
        f"h = {1 - found.t:.4g} * natural frequencies + {found.t:.4g} * found",
        f"{found.num_held} documents held back",
        "generic validation",
        f"weights: {out}",
    ):
        assert words in printed, words
    assert "outside" not in printed
    (line,) = [x for x in printed.splitlines() if x.startswith("train on them: soup-jax train ")]
    fields = {"corpus.dir": tiny_corpus, "num_steps": 3, "batch_size": 8}
    (tmp_path / "c.py").write_text(GENERIC_CONFIG.format(fields=fields))
    words = shlex.split(line)[5:]
    words[words.index("--config=C:generic")] = f"--config={tmp_path}/c.py:generic"
    words[words.index("--workdir=RUN")] = f"--workdir={tmp_path}/run"
    assert main.run(["train", *words]) == 0
    made = load(tmp_path / "run")
    assert (made.step, made.cfg.domain_weights.file) == (3, 1)
    assert made.cfg.domain_weights.path == str(out)


def test_documents_that_resemble_nothing_are_warned_of(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search_lib, "STEPS", 0)
    rng = np.random.default_rng(0)
    strange = ["".join(rng.choice(list("qxzjvQXZ~^|"), 300)) for _ in range(5)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in strange))
    flags = [f"--run={trained.workdir}", f"--target={tmp_path}/x.jsonl", f"--out={tmp_path}/h.json"]
    assert main.run(["mix", *flags]) == 0
    printed = capsys.readouterr().out
    assert "warning: only 4 documents" in printed
    assert "resemble" in printed


def test_what_it_refuses(trained, generic_run, texts, tiny_text, tmp_path, capsys):
    with pytest.raises(UserError, match="at least two target documents"):
        mixture_lib.find_mixture(trained, texts[:1])
    for within in (-0.1, float("nan")):
        with pytest.raises(UserError, match="must be a number of at least 0"):
            mixture_lib.find_mixture(trained, texts, generic_within=within)
    # A floor needs the corpus, and says so; without one the corpus may be gone.
    copy = tmp_path / "run"
    shutil.copytree(trained.workdir, copy)
    config = json.loads((copy / "config.json").read_text())
    config["corpus"]["dir"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(config))
    target, out = f"--target={tiny_text}/cooking.jsonl", f"--out={tmp_path}/h.json"
    for run, more, says in (
        (generic_run, [], "has no experts"),
        (
            copy,
            ["--generic_within=0.01"],
            "give its folder: --corpus=DIR of `instantiate` and `mix`",
        ),
    ):
        assert main.run(["mix", f"--run={run}", target, out, *more]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "soup-jax: error: " in x]
        assert says in line
        assert not (tmp_path / "h.json").exists()
