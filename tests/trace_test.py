"""Profiler traces of the steps that are asked for."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from conftest import tiny_config

from soup_jax.config import schema
from soup_jax.errors import UserError
from soup_jax.training.trace import traced


@jax.jit
def squares(x):
    with jax.named_scope("merge"):
        return x @ x


def run(workdir, *, first_step, steps, stop_after=None):
    """Names of the traces' steps, and how often the loop waited."""
    cfg, waits = tiny_config(**{"log.profile": steps}), []
    for step in traced(range(first_step, 8), cfg, workdir, lambda ahead: waits.append(ahead)):
        squares(jnp.ones((8, 8))).block_until_ready()
        if step == stop_after:
            break
    return waits


def test_without_steps_there_is_no_trace(tmp_path):
    assert run(tmp_path, first_step=0, steps=()) == []
    assert not list(tmp_path.iterdir())


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
