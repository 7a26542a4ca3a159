"""The harness's own command on a local task gives the losses of `soup-jax score`.

Run where lm_eval is installed: `bash launch/test.sh --hf`.
"""

import json
import math
import subprocess
import sys

import pytest

from soup_jax.evaluation.score import total
from soup_jax.specialists.instantiate import instantiate_to
from soup_jax.specialists.open import load
from soup_jax.specialists.specialist import Specialist

pytest.importorskip("lm_eval")

ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: bits_per_byte}}
"""
CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["butter and flour", "mast and rudder"]
doc_to_target: answer
metric_list:
  - {{metric: acc}}
"""


@pytest.fixture(scope="module")
def specialist(tiny_run, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("lm_eval") / "cooking"
    instantiate_to(tiny_run, str(tiny_text / "cooking.jsonl"), out)
    return out


def _evaluate(folder, arguments: str, task: str) -> dict:
    command = [sys.executable, "-m", "soup_jax.specialists.lm_eval", "--model", "soup_jax"]
    command += ["--model_args", arguments, "--tasks", task, "--include_path", str(folder)]
    command += ["--output_path", str(folder / "out")]
    subprocess.run(command, check=True, timeout=600)
    (results,) = sorted((folder / "out").rglob("results_*.json"))[-1:]
    return json.loads(results.read_text())["results"][task]


def test_bits_per_byte_are_those_of_score(specialist, tiny_run, tiny_text, tmp_path):
    file = tiny_text / "python.jsonl"
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    (tmp_path / "task.yaml").write_text(ROLLING.format(name="loss", file=file))
    generic = load(tiny_run).generic()
    for arguments, model in (
        (f"model={specialist}", Specialist.load(specialist)),
        (f"run={tiny_run}", generic),
    ):
        found = _evaluate(tmp_path, arguments, "loss")["bits_per_byte,none"]
        assert math.isclose(found, total(model.score(texts)).bits_per_byte, rel_tol=1e-6)


def test_choices_are_those_of_score(specialist, tiny_run, tiny_text, tmp_path):
    rows = [{"question": "whisk the dough and the", "answer": i % 2} for i in range(4)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(CHOICES.format(name="choices", file=file))
    model, nats = Specialist.load(specialist), []
    for choice in ("butter and flour", "mast and rudder"):
        whole, context = (model.score([t])[0] for t in (f"{rows[0]['question']} {choice}", ""))
        nats.append(whole.nats - context.nats)
    best = nats.index(min(nats))
    accuracy = sum(row["answer"] == best for row in rows) / len(rows)
    documents = tiny_text / "cooking.jsonl"
    for arguments in (f"model={specialist}", f"run={tiny_run},documents={documents}"):
        assert _evaluate(tmp_path, arguments, "choices")["acc,none"] == accuracy
