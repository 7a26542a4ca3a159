"""Profiler traces of the steps that are asked for."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from conftest import tiny_config

from soup_jax.config import schema
from soup_jax.errors import UserError
from soup_jax.planning import abstract
from soup_jax.training import build
from soup_jax.training.trace import traced


@jax.jit
def squares(x):
    return x @ x


class Skipped:
    """In the place of a run's meter."""

    def __init__(self):
        self.seconds = []

    def skip(self, seconds):
        self.seconds.append(seconds)


def run(workdir, *, first_step, steps, stop_after=None):
    """How often the loop waited."""
    cfg, waits, meter = tiny_config(**{"log.profile": steps, "num_steps": 8}), [], Skipped()
    for step in traced(first_step, cfg, workdir, lambda ahead: waits.append(ahead), meter):
        squares(jnp.ones((8, 8))).block_until_ready()
        if step == stop_after:
            break
    assert len(meter.seconds) == len(waits)
    return waits


def test_without_steps_there_is_no_trace(tmp_path, caplog):
    assert run(tmp_path, first_step=0, steps=()) == []
    assert not list(tmp_path.iterdir())
    assert not caplog.messages


@pytest.mark.parametrize(("first_step", "steps"), [(6, (5, 6)), (0, (9, 12))])
def test_steps_that_are_over_or_never_come_are_told(first_step, steps, tmp_path, caplog):
    assert run(tmp_path, first_step=first_step, steps=steps) == []
    assert "no trace: steps" in caplog.text


def test_the_parts_of_a_step_have_names():
    cfg = tiny_config(num_mixtures=8)
    step = abstract.abstract_step(cfg, build.make_mesh(cfg))
    text = step.function.lower(*step.arguments).as_text(debug_info=True)
    names = ("merge", "forward_backward", "bank_gradients", "update_shared", "update_bank")
    assert [name for name in names if f"/{name}/" in text] == list(names)


@pytest.mark.parametrize(
    ("first_step", "stop_after", "expected"),
    [(0, None, ["5", "6"]), (5, None, ["6"]), (0, 4, ["5"])],
    ids=["all", "a later start", "an early end"],
)
def test_a_trace_of_the_steps_asked_for(first_step, stop_after, expected, tmp_path):
    waits = run(tmp_path, first_step=first_step, steps=(5, 6), stop_after=stop_after)
    assert waits == ([0] if stop_after else [0, 0])
    (found,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(found.read_bytes()))["traceEvents"]
    steps = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
    assert sorted(steps) == expected


@pytest.mark.parametrize("steps", [(5,), (0, 3), (6, 5), ("5", "6")])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(UserError, match=r"log\.profile = .* must be the first and the last step"):
        schema.check(tiny_config(**{"log.profile": steps}))
