"""What the first version wrote is read for ever: a corpus, two runs, a specialist.

tests/artifacts/v1.tar.xz was written by the first version and is never made anew: a change that
these tests refuse would orphan the files of users. In it are

    corpus/        prepared from text/generic.jsonl
    soup/, adamw/  runs of 12 steps killed at step 8: dense and low-rank experts and the optimizer
                   `merged`; dense experts, bank and moments in bfloat16 and `adamw`
    specialist/    made from soup/ and text/cooking.jsonl

and, to compare with, undisturbed.jsonl (metrics of the run that was not killed), evaluation.json
and expected.json.
"""

import json
import pathlib
import tarfile

import numpy as np
import pytest

from soup_jax.config import schema as config
from soup_jax.data.prepare.stages import prepare
from soup_jax.data.sources import hash_fraction
from soup_jax.evaluation import sets
from soup_jax.specialists.compare import evaluate_runs
from soup_jax.specialists.instantiate import instantiate_to
from soup_jax.specialists.specialist import Specialist
from soup_jax.training import loop

ARCHIVE = pathlib.Path(__file__).parent / "artifacts" / "v1.tar.xz"
TIMES = ("step_ms", "data_wait_ms", "tokens_per_second")


@pytest.fixture(autouse=True)
def v1(tmp_path, monkeypatch) -> pathlib.Path:
    """The folder with the files of the first version; paths in them are relative to it."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _json(path: str) -> dict:
    return json.loads(pathlib.Path(path).read_text())


def _metrics(path: str) -> list[dict]:
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def _assert_close(found, expected, **tolerance):
    """Every number of `expected`, at its place in `found`, which may hold more."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            _assert_close(found[name], value, **tolerance)
    elif isinstance(expected, str):
        assert found == expected
    else:
        np.testing.assert_allclose(found, expected, **tolerance)


@pytest.mark.parametrize("name", ["soup", "adamw"])
def test_run_goes_on_as_if_never_killed(name):
    workdir = pathlib.Path(name)
    state = loop.train(config.load(workdir / "config.json"), workdir)
    assert int(state.step) == 12
    found, expected = _metrics(f"{name}/metrics.jsonl"), _metrics(f"{name}/undisturbed.jsonl")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, wanted in zip(found, expected):
        wanted = {field: value for field, value in wanted.items() if field not in TIMES}
        # Losses of domains are rounded to four digits.
        _assert_close(line.pop("domains"), wanted.pop("domains"), atol=1.1e-4)
        _assert_close(line, wanted, rtol=1e-5)


def test_evaluation(monkeypatch, caplog):
    # Version 1 parted a specialist's documents by the bits that split a corpus. On its parts, its
    # numbers come out.
    monkeypatch.setattr(sets, "part_fraction", hash_fraction)
    found = evaluate_runs("soup", specialists=["text/cooking.jsonl"])
    _assert_close(found, _json("evaluation.json"), rtol=1e-5)
    # Its corpora kept no hashes of what is in them.
    assert caplog.text.count("documents that are in its training text are scored like others") == 1
    assert found["specialists"]["cooking"]["documents_in_training"] is None


def test_instantiation():
    made, _ = instantiate_to("soup", "text/cooking.jsonl", "made", method="histogram")
    np.testing.assert_allclose(made.alpha_E, _json("expected.json")["alpha"], rtol=1e-5)
    new, old = (Specialist.load(folder) for folder in ("made", "specialist"))
    assert new.recipe["h"] == old.recipe["h"]
    _assert_close(new.params, old.params, rtol=1e-5, atol=1e-7)


def test_generation():
    text = Specialist.load("specialist").generate("butter", max_tokens=12, temperature=0.0, seed=0)
    assert text == _json("expected.json")["generated"]


def test_corpus_is_prepared_already(capsys):
    before = pathlib.Path("corpus/manifest.json").read_bytes()
    prepare(config.load(pathlib.Path("soup/config.json")))
    assert "corpus is already prepared" in capsys.readouterr().err
    assert pathlib.Path("corpus/manifest.json").read_bytes() == before
