"""One seed and config on any devices and processes: the same batches, the same losses, one run.

Losses are compared with LOSS_BOUND. The number of devices decides in which order float32 sums are
taken: a gradient element that cancels to rounding noise gets another sign, and Adam's first steps
move it by the full learning rate in either direction unless its epsilon is above that noise. So the
config here has an epsilon of 1e-5. Measured with it over 24 steps: 1.4e-5 nats at most between any
two of 1, 2 and 8 devices. With the default, 1e-8: 5e-7 for one seed, 4e-4 for another. On one
mesh of 8 devices, 2 and 4 processes give bit-identical losses, and one process differs from them by
the order of its own sums.
"""

import os
import shutil
import signal

import jax
import numpy as np
import pytest
from checkpoint_test import garble
from conftest import tiny_config
from loop_test import assert_same_state, final_state
from processes import start, write_config

from soup_jax.data import loader
from soup_jax.evaluation import evaluator
from soup_jax.evaluation import sets as sets_lib
from soup_jax.training import build, metrics
from soup_jax.training import loop as train
from soup_jax.training import setup as run_lib
from soup_jax.training.checkpoint import Checkpointer

NUM_STEPS = 24
TO_DEVICE = loader.to_device
LOSS_BOUND = 5e-5


@pytest.fixture(scope="module")
def cfg(tiny_corpus):
    fields = {"corpus.dir": tiny_corpus, "num_steps": NUM_STEPS, "log.every_steps": 1}
    fields |= {
        "seed": 1,
        "optimizer.eps": 1e-5,
        "model.num_layers": 1,
        "distributed.init_timeout_secs": 120,
    }
    return tiny_config(**fields)


@pytest.fixture(scope="module")
def whole(cfg, tmp_path_factory):
    """(num_devices) -> (final state, lines) of a run that nothing interrupts."""
    runs = {}

    def run(num_devices):
        if num_devices not in runs:
            workdir = tmp_path_factory.mktemp("whole")
            state = train.train(cfg, workdir, devices=jax.devices()[:num_devices])
            runs[num_devices] = state, lines_of(workdir)
        return runs[num_devices]

    return run


def lines_of(workdir):
    return metrics.read_metrics(workdir / "metrics.jsonl")


def assert_same_run(lines, expected, bound=LOSS_BOUND):
    for name in ("step", "batch_hash"):
        assert [v[name] for v in lines] == [v[name] for v in expected]
    assert [v["step"] for v in lines] == list(range(1, NUM_STEPS + 1))
    losses, wanted = ([v["loss"] for v in x] for x in (lines, expected))
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=bound)


def test_losses_and_batches_do_not_depend_on_the_number_of_devices(whole):
    """1 and 8; a slow test has 4 and 2."""
    state, lines = whole(1)
    assert {d for x in jax.tree.leaves(state) for d in x.devices()} == {jax.devices()[0]}
    assert_same_run(lines, whole(8)[1])
    hashes = [v["batch_hash"] for v in lines]
    assert len(set(hashes)) == NUM_STEPS


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices(cfg, whole, tmp_path, monkeypatch):
    for num_devices, stop in ((8, 4), (4, 7), (2, 10), (1, 13), (8, None)):
        devices = jax.devices()[:num_devices]
        if stop is None:
            train.train(cfg, tmp_path, devices=devices)
        else:
            stop_after(monkeypatch, stop - (latest(tmp_path) if stop > 4 else 0))
            with pytest.raises(train.Interrupted, match=f"saved step {stop} of {NUM_STEPS}"):
                train.train(cfg, tmp_path, devices=devices)
    assert_same_run(lines_of(tmp_path), whole(8)[1])


def stop_after(monkeypatch, num_steps):
    """SIGTERM in the step of that number, counted from 1."""
    original, left = TO_DEVICE, [num_steps]

    def to_device(*arguments):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(loader, "to_device", to_device)


def latest(workdir):
    with Checkpointer(workdir / "checkpoints") as reader:
        return reader.steps()[-1]


def test_many_processes_stopped_killed_and_resumed_make_the_run_of_one(
    cfg, whole, tiny_text, tmp_path, monkeypatch
):
    """One process saves step 4. From there two run to the end (the reference); two run and are
    stopped, four go on and one is killed, two finish: bit for bit the reference."""
    config, workdir, reference = write_config(tmp_path, cfg), tmp_path / "run", tmp_path / "two"
    stop_after(monkeypatch, 4)
    with pytest.raises(train.Interrupted, match="saved step 4 of 24"):
        train.train(cfg, workdir)
    shutil.copytree(workdir, reference)

    with start(config, reference, 2) as processes:
        statuses, outputs = processes.join()
    assert statuses == [0, 0], outputs
    assert "starting at step 4" in outputs[0]
    assert_same_run(lines_of(reference), whole(8)[1])

    # SIGTERM at process 1, in its third step: both save the same step and end with 0.
    with start(config, workdir, 2, process="1", what="SIGTERM", step=2) as processes:
        statuses, outputs = processes.join()
    assert statuses == [0, 0], outputs
    assert "process 0 of 2 (explicit settings)" in outputs[0]
    assert "process 1 of 2 (explicit settings)" in outputs[1]
    assert ": 4 x cpu (cpu)" in outputs[1]
    stopped = latest(workdir)
    assert 7 <= stopped < 15
    assert f"SIGTERM at process 1: saved step {stopped} of {NUM_STEPS}" in outputs[0]
    assert len(lines_of(workdir)) == stopped
    # Only process 0 logs, and nobody writes files but these.
    assert "loss" not in outputs[1]
    names = ["checkpoints", "config.json", "domains", "metrics.jsonl", "parameters.txt"]
    assert sorted(p.name for p in workdir.iterdir()) == [*names, "starts.jsonl"]

    # Four processes go on; one is killed in the middle, the others say so and leave.
    with start(config, workdir, 4, process="2", what="SIGKILL", step=4) as processes:
        statuses, outputs = processes.join()
    assert statuses[2] == -signal.SIGKILL, outputs
    for i in (0, 1, 3):
        assert statuses[i] == 1, outputs[i]
        told = [x for x in outputs[i].splitlines() if x.startswith("soup-jax: error: process ")]
        assert "process 2 (" in told[0], outputs[i]
        assert "is gone: killed or crashed (last seen at " in told[0]
    assert f"starting at step {stopped}" in outputs[0]
    assert len(lines_of(workdir)) < NUM_STEPS

    # Two go on from the last checkpoint with the right data, and evaluate at the end.
    before, sets = latest(workdir), str(tiny_text / "cooking.jsonl")
    flags = [f"--config.evaluate.specialists=('{sets}',)", "--config.evaluate.every_steps=100"]
    with start(config, workdir, 2, *flags) as processes:
        statuses, outputs = processes.join()
    assert statuses == [0, 0], outputs
    assert f"starting at step {before}" in outputs[0]
    assert "(learning curve: " in outputs[0]
    assert_same_run(lines_of(workdir), lines_of(reference), bound=0)
    state, data = final_state(cfg, workdir)
    assert data["step"] == NUM_STEPS
    assert_same_state(state, final_state(cfg, reference)[0])
    (line,) = metrics.read_metrics(workdir / "metrics.jsonl", kind="evaluation")
    assert_evaluates_to(line, cfg, workdir, state, sets)


def assert_evaluates_to(line, cfg, workdir, state, path):
    """Two processes evaluated as one does: float32 sums of a few hundred rows, in another order."""
    run = run_lib.setup(cfg, workdir)
    again = evaluator.evaluate(
        evaluator.Evaluator(
            build.soup_config(cfg), run.model, run.mesh, batch_size=cfg.evaluate.batch_size
        ),
        state.params,
        run.corpus.domain_frequencies,
        specialists=[sets_lib.specialist_set("cooking", path, run.corpus, cfg, part="tuning")],
        validation=sets_lib.validation_set(run.corpus, max_windows=cfg.evaluate.max_windows),
    )
    for name in ("average", "generic_validation"):
        assert line[name].keys() == again[name].keys()
        for column, value in again[name].items():
            np.testing.assert_allclose(line[name][column]["loss"], value["loss"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_many_processes_agree_on_the_newest_checkpoint_that_can_be_read(
    num_processes, cfg, whole, tmp_path, monkeypatch
):
    config, workdir = write_config(tmp_path, cfg), tmp_path / "run"
    stop_after(monkeypatch, 7)
    with pytest.raises(train.Interrupted, match="saved step 7 of 24"):
        train.train(cfg, workdir)
    garble(workdir / "checkpoints" / "7")
    with start(config, workdir, num_processes) as processes:
        statuses, outputs = processes.join()
    assert statuses == [0] * num_processes, outputs
    for output in outputs:
        assert "unreadable checkpoint, trying the one before: step 7: " in output
    assert "starting at step 5" in outputs[0]
    assert (workdir / "checkpoints" / "unreadable_7").exists()
    assert_same_run(lines_of(workdir), whole(8)[1])
