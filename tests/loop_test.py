"""Whole runs: killed, stopped, resumed, refused, diverged, evaluated."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from soup_jax import tree
from soup_jax.config import schema as config
from soup_jax.data import loader
from soup_jax.errors import UserError
from soup_jax.evaluation import evaluator
from soup_jax.processes.group import Solo
from soup_jax.specialists import open as open_lib
from soup_jax.training import build, divergence, metrics
from soup_jax.training import loop as train
from soup_jax.training import setup as run_lib
from soup_jax.training import step as train_step
from soup_jax.training.checkpoint import Checkpointer
from soup_jax.training.meter import Meter

# Some saves lie between two lines: a line's mean then spans a restart.
FIELDS = {"checkpoint.every_steps": 4, "log.every_steps": 3}


@pytest.fixture
def make_cfg(tiny_corpus):
    return lambda **changes: tiny_config(**({"corpus.dir": tiny_corpus} | FIELDS | changes))


@pytest.fixture(scope="module")
def undisturbed(tiny_corpus, tiny_text, tmp_path_factory):
    """(evaluates) -> (state, workdir) of the run of `make_cfg`, made once; to be read only."""
    made = {}

    def run(evaluates=False):
        if evaluates not in made:
            fields = {"corpus.dir": tiny_corpus} | FIELDS
            fields |= evaluating(tiny_text) if evaluates else {}
            workdir = tmp_path_factory.mktemp("undisturbed") / "run"
            made[evaluates] = train.train(tiny_config(**fields), workdir), workdir
        return made[evaluates]

    return run


def assert_same_state(a, b):
    a, b = (tree.flatten({"p": s.params, "o": s.opt_state, "step": s.step}) for s in (a, b))
    assert a.keys() == b.keys()
    for path, x in a.items():
        assert np.asarray(x).tobytes() == np.asarray(b[path]).tobytes(), path


def final_state(cfg, workdir):
    with Checkpointer(workdir / "checkpoints") as reader:
        return reader.restore(run_lib.setup(cfg, workdir).abstract)


TIMES = ("step_ms", "data_wait_ms", "tokens_per_second")


def lines_of(workdir, kind="train"):
    """Lines of metrics without what depends on the clock."""
    lines = metrics.read_metrics(workdir / "metrics.jsonl", kind=kind)
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.fixture
def fed(monkeypatch):
    """Hashes of the batches that reach the device; `fed.at[n] = f` calls f before the n-th."""

    class Fed(list):
        at: dict = {}  # noqa: RUF012

    seen, original = Fed(), loader.to_device
    seen.at = {}

    def to_device(batch, mesh):
        seen.at.pop(len(seen) + 1, lambda: None)()
        whole = b"".join(x.tobytes() for x in jax.tree.leaves(batch))
        seen.append(hashlib.sha256(whole).hexdigest())
        return original(batch, mesh)

    monkeypatch.setattr(loader, "to_device", to_device)
    return seen


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


CONFIG = """
import json, os, time
from soup_jax.data import loader
from soup_jax.experiments import base

if os.environ.get("SLOW"):  # leaves time to be killed between two steps
    original = loader.to_device
    loader.to_device = lambda *a: (time.sleep(0.05), original(*a))[1]


def get_config():
    cfg = base.get_config()
    cfg.update_from_flattened_dict(json.loads({fields!r}))
    return cfg
"""


@pytest.mark.parametrize("bank", ["merged", pytest.param("adamw", marks=pytest.mark.slow)])
def test_killed_and_terminated_runs_end_bit_identical(bank, make_cfg, tmp_path):
    cfg = make_cfg(**{"optimizer.bank": bank, "num_steps": 33})
    flat = {
        f"{a}.{b}" if b else a: v
        for a, section in cfg.to_dict().items()
        for b, v in (section.items() if isinstance(section, dict) else [("", section)])
    }
    flat.pop("experts.rules")  # JSON has no tuples; the default is the same
    path, workdir = tmp_path / "config.py", tmp_path / "killed"
    path.write_text(CONFIG.format(fields=json.dumps(flat)))
    command = [sys.executable, "-m", "soup_jax.cli", "train"]
    command += [f"--config={path}", f"--workdir={workdir}"]

    def start(**environment):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=os.environ | environment, **pipes)

    def wait_for(process, step):
        while process.poll() is None:
            file = workdir / "metrics.jsonl"
            if file.exists() and f'"step": {step},' in file.read_text():
                return
            time.sleep(0.005)
        raise AssertionError(process.communicate())

    process = start(SLOW="1")
    wait_for(process, random.randrange(6, 12, 3))
    time.sleep(random.random() * 0.2)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    process = start(SLOW="1")
    wait_for(process, 15)
    process.terminate()
    out, err = process.communicate()
    assert process.returncode == 0, err
    with Checkpointer(workdir / "checkpoints") as reader:
        stopped = reader.steps()[-1]
    assert f"SIGTERM: saved step {stopped} of 33" in out
    assert 15 <= stopped < 33

    out, err = (process := start()).communicate()
    assert process.returncode == 0, err
    whole = train.train(cfg, tmp_path / "whole")
    state, data = final_state(cfg, workdir)
    assert data["step"] == 33
    assert_same_state(state, whole)
    assert lines_of(workdir) == lines_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("bank", ["merged", "adamw"])
def test_a_stopped_run_loses_no_step_and_repeats_no_batch(bank, make_cfg, tmp_path, fed):
    cfg = make_cfg(**{"optimizer.bank": bank})
    whole = train.train(cfg, tmp_path / "whole")
    batches = list(fed)
    assert len(set(batches)) == cfg.num_steps
    fed.clear()
    for step in (3, 10):
        fed.at = {step: terminate}
        with pytest.raises(train.Interrupted, match=f"SIGTERM: saved step {step} of 12"):
            train.train(cfg, tmp_path / "cut")
        assert len(fed) == step
    state = train.train(cfg, tmp_path / "cut")
    assert list(fed) == batches
    assert_same_state(state, whole)
    (saved, data), (_, undisturbed) = (final_state(cfg, tmp_path / n) for n in ("cut", "whole"))
    assert_same_state(saved, whole)
    assert data["meter"]["first_loss"] == undisturbed["meter"]["first_loss"] > 0
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_stopped_run_with_low_rank_experts_ends_bit_identical(make_cfg, tmp_path, fed, tiny_text):
    """And gives a specialist, which is an ordinary model."""
    rules = ((r"layers/attention/.*|embedding", "low_rank:4"), (".*", "dense"))
    cfg = make_cfg(**{"experts.rules": rules, "experts.dtype": "bfloat16"})
    whole = train.train(cfg, tmp_path / "whole")
    fed.clear()
    fed.at = {7: terminate}
    with pytest.raises(train.Interrupted):
        train.train(cfg, tmp_path / "cut")
    assert_same_state(train.train(cfg, tmp_path / "cut"), whole)
    trained = open_lib.load(tmp_path / "cut")
    made = trained.instantiate([(tiny_text / "cooking.jsonl").read_text()])
    shared, merged = tree.flatten(trained.params["shared"]), tree.flatten(made.params)
    assert {p: x.shape for p, x in merged.items()} == {p: x.shape for p, x in shared.items()}
    factors = tree.flatten(trained.params["bank"]["low_rank"])
    left, right = (np.asarray(factors[f"embedding/{n}"], np.float64) for n in ("left", "right"))
    expected = shared["embedding"] + np.einsum("e,ear,erb->ab", made.alpha_E, left, right)
    np.testing.assert_allclose(merged["embedding"], expected, atol=1e-5)
    assert abs(merged["embedding"] - shared["embedding"]).max() > 1e-5


def test_the_step_is_compiled_once_a_run(make_cfg, tmp_path, monkeypatch, fed):
    steps, original = [], train_step.compile_step
    monkeypatch.setattr(
        train_step, "compile_step", lambda *a: steps.append(original(*a)) or steps[-1]
    )
    fed.at = {5: terminate}
    with pytest.raises(train.Interrupted):
        train.train(make_cfg(), tmp_path)
    train.train(make_cfg(), tmp_path)
    assert [s.jitted._cache_size() for s in steps] == [1, 1]


def test_a_finished_run_started_again_does_nothing(make_cfg, undisturbed, tmp_path, fed):
    state, finished = undisturbed()
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    count, before = len(fed), (tmp_path / "metrics.jsonl").read_bytes()
    folders = sorted((tmp_path / "checkpoints").rglob("*"))
    assert_same_state(train.train(make_cfg(), tmp_path), state)
    assert len(fed) == count
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert sorted((tmp_path / "checkpoints").rglob("*")) == folders


def test_a_loss_that_is_not_finite_stops_the_run(make_cfg, tmp_path):
    cfg, bad = make_cfg(), 7
    run = run_lib.setup(cfg, tmp_path)
    offsets = run.corpus.offsets["train"]
    windows = [
        run.corpus.read_windows("train", offsets[p.domain_B] + p.window_B)
        for p in (run.plan[i] for i in range(bad + 1))
    ]
    known = {row.tobytes() for rows in windows[:bad] for row in rows}
    poison = next(row for row in windows[bad] if row.tobytes() not in known)

    def poisoned(row):
        good = build.base_model(cfg)

        def example_losses(params, batch):
            value, weight = good.example_losses(params, batch)
            hit = (batch["tokens"] == jnp.asarray(row)).all(-1)
            return jnp.where(hit[:, None], jnp.nan, value), weight

        return dataclasses.replace(good, example_losses=example_losses)

    with pytest.raises(FloatingPointError, match=f"step {bad} is not finite") as e:
        train.train(cfg, tmp_path, model=poisoned(poison))
    report = json.loads((tmp_path / f"nonfinite_{bad}.json").read_text())
    domains = np.unique(run.plan[bad].domain_B)
    assert set(report["domains"]) == {str(k) for k in domains}
    for k in domains:
        assert run.corpus.label(int(k)) in str(e.value)
    assert report["window"] == run.plan[bad].window_B.tolist()
    state, data = final_state(cfg, tmp_path)
    assert data["step"] == bad
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.opt_state)))
    assert all(np.isfinite(line["loss"]) for line in lines_of(tmp_path))
    # With the batch left out, as the message says, it continues.
    assert '--accept_changes --config.skip_batches="((7, 7),)"' in str(e.value)
    assert f"init_from={tmp_path} --config.checkpoint.init_step=4 " in str(e.value)
    cfg = make_cfg(skip_batches=((bad, bad),))
    resumed = train.train(cfg, tmp_path, model=poisoned(poison), accept_changes=True)
    # The same program but for a constant, a row that is nowhere in the corpus.
    whole = train.train(cfg, tmp_path / "whole", model=poisoned(np.roll(poison, 1)))
    assert_same_state(resumed, whole)


def test_a_batch_left_out_and_a_rate_changed_on_the_way_hold_from_there_on(make_cfg, tmp_path, fed):
    """As in a run that had the skipped batch in its config from the start and was killed."""
    skip = {"skip_batches": ((5, 6), (9, 9))}
    whole = train.train(make_cfg(**skip), tmp_path / "whole")
    batches = list(fed)
    every = run_lib.setup(make_cfg(), tmp_path / "every")
    settings = {"start_step": 0, "num_steps": 15, "num_threads": 1, "prefetch": 1}
    rows = np.arange(every.cfg.batch_size)
    for batch in loader.batches(every.corpus, every.plan, rows=rows, **settings):
        loader.to_device(batch, every.mesh)
    plain = fed[len(batches) :]
    assert batches == [plain[i] for i in (*range(5), 7, 8, *range(10, 15))]

    fed.clear()
    fed.at = {5: terminate}
    with pytest.raises(train.Interrupted):
        train.train(make_cfg(), tmp_path / "cut")
    with pytest.raises(UserError, match=r"skip_batches: \(\) -> .*with --accept_changes\)"):
        train.train(make_cfg(**skip), tmp_path / "cut")
    fed.at = {len(fed) + 3: terminate}
    with pytest.raises(train.Interrupted):
        train.train(make_cfg(**skip), tmp_path / "cut", accept_changes=True)
    state = train.train(make_cfg(**skip), tmp_path / "cut")
    assert list(fed) == batches
    assert_same_state(state, whole)
    (line,) = changes(tmp_path / "cut")
    assert (line["step"], line["field"], line["new"]) == (5, "skip_batches", [[5, 6], [9, 9]])

    late = {"skip_batches": ((5, 6), (8, 9))}
    with pytest.raises(UserError, match="batches that the run has trained on"):
        train.train(make_cfg(**late), tmp_path / "cut", accept_changes=True)
    assert changes(tmp_path / "cut") == [line]
    with pytest.raises(UserError, match=r"num_steps = 6, but the run has done 12 steps"):
        train.train(make_cfg(**skip, num_steps=6), tmp_path / "cut", accept_changes=True)


def changes(workdir):
    return [json.loads(line) for line in (workdir / "changes.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_rate_lowered_on_the_way_is_used_from_then_on(make_cfg, tmp_path, fed):
    cfg = {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0, "log.every_steps": 1}
    fed.at = {4: terminate}
    with pytest.raises(train.Interrupted):
        train.train(make_cfg(**cfg), tmp_path)
    lowered = make_cfg(**cfg, **{"optimizer.learning_rate": 1e-4, "num_steps": 14})
    state = train.train(lowered, tmp_path, accept_changes=True)
    lines = metrics.read_metrics(tmp_path / "metrics.jsonl")
    rates = [line["learning_rate"] for line in lines]
    np.testing.assert_allclose(rates, [3e-3] * 4 + [1e-4] * 10, rtol=1e-6)
    assert int(state.step) == 14
    made = {line["field"]: (line["step"], line["old"], line["new"]) for line in changes(tmp_path)}
    expected = {"optimizer.learning_rate": (4, 3e-3, 1e-4), "num_steps": (4, 12, 14)}
    assert made == expected
    assert config.diff(config.load(tmp_path / "config.json"), lowered) == {}
    assert_same_state(train.train(lowered, tmp_path), state)  # the same command goes on


def test_a_new_run_starts_from_the_parameters_of_another(make_cfg, undisturbed, tmp_path):
    shutil.copytree(undisturbed()[1], tmp_path / "source")
    cfg = make_cfg(
        **{
            "checkpoint.init_from": str(tmp_path / "source"),
            "checkpoint.init_step": 8,
            "optimizer.bank": "adamw",
            "num_steps": 4,
        }
    )
    run = run_lib.setup(cfg, tmp_path / "new")
    run_lib.read_initial(run)
    with Checkpointer(tmp_path / "new" / "checkpoints", cfg) as checkpointer:
        state = run_lib.restore_or_init(run, checkpointer)
    fresh = run.init()
    with Checkpointer(tmp_path / "source" / "checkpoints") as reader:
        params, _ = reader.restore_params(run.abstract.params, step=8)
    assert_same_state(state, fresh._replace(params=params))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, fresh)

    train.train(cfg, tmp_path / "new")
    (line,) = changes(tmp_path / "new")
    assert (line["step"], line["field"], line["new"]["step"]) == (0, "checkpoint.init_from", 8)
    # The run has checkpoints of its own now: the other is not looked at.
    (tmp_path / "source").rename(tmp_path / "moved")
    assert int(train.train(cfg, tmp_path / "new").step) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoint.init_from": "nowhere"}, "nowhere is not a run"),
        ({"checkpoint.init_step": 3}, "no checkpoint of step 3"),
        ({"num_experts": 3}, r"does not fit this config[\s\S]*params/bank"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_before_work(
    fields, message, tiny_run, make_cfg, tmp_path
):
    cfg = make_cfg(**({"checkpoint.init_from": str(tiny_run)} | fields))
    with pytest.raises(UserError, match=message):
        train.train(cfg, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def evaluating(tiny_text):
    names = ("cooking", "python")
    files = tuple(str(tiny_text / f"{n}.jsonl") for n in names)
    return {"evaluate.specialists": files, "evaluate.every_steps": 6}


def test_evaluation_during_training_writes_lines(undisturbed):
    state, workdir = undisturbed(evaluates=True)
    lines = metrics.read_metrics(workdir / "metrics.jsonl", kind="evaluation")
    assert [line["step"] for line in lines] == [6, 12]
    for line in lines:
        assert set(line["specialists"]) == {"cooking", "python"}
        for row in [*line["specialists"].values(), line["average"]]:
            for column in ("specialist", "generic_h", "shared"):
                assert 0 < row[column]["loss"] < 10
        assert set(line["generic_validation"]) == {"generic_h", "shared"}
    assert_same_state(state, undisturbed()[0])


def evaluations(workdir):
    return metrics.read_metrics(workdir / "metrics.jsonl", kind="evaluation")


@pytest.mark.parametrize("step", [6, pytest.param(12, marks=pytest.mark.slow)])
def test_an_evaluation_cut_by_sigterm_is_made_up(
    step, make_cfg, undisturbed, tiny_text, tmp_path, monkeypatch
):
    cfg, original = make_cfg(**evaluating(tiny_text)), evaluator.Evaluator.shared
    expected, whole = undisturbed(evaluates=True)
    workdir, left = tmp_path / "cut", [step // 6]

    def shared(*arguments):
        left[0] -= 1
        if left[0] == 0:
            terminate()
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "shared", shared)
        with pytest.raises(train.Interrupted, match=f"saved step {step} of 12"):
            train.train(cfg, workdir)
    assert final_state(cfg, workdir)[1]["step"] == step
    assert [v["step"] for v in evaluations(workdir)] == list(range(6, step, 6))
    assert_same_state(train.train(cfg, workdir), expected)
    assert evaluations(workdir) == evaluations(whole)
    # The checkpoint says still that one is due; the metrics say that it was made.
    train.train(cfg, workdir)
    assert evaluations(workdir) == evaluations(whole)


def test_processes_must_have_the_same_evaluation_sets(make_cfg, tiny_text, tmp_path, monkeypatch):
    compared = []

    def require_same(_, what, facts, **__):
        if what == "evaluation sets":
            compared.append(facts)
            raise UserError("stop here")

    monkeypatch.setattr(Solo, "require_same", require_same)
    lines = (tiny_text / "cooking.jsonl").read_text().splitlines(keepends=True)
    fields = evaluating(tiny_text) | {"evaluate.specialists": (str(tmp_path / "set.jsonl"),)}
    for kept in (lines, lines, lines[::2]):
        (tmp_path / "set.jsonl").write_text("".join(kept))
        with pytest.raises(UserError, match="stop here"):
            train.train(make_cfg(**fields), tmp_path / "run")
    assert compared[0] == compared[1] != compared[2]


def test_a_file_in_the_place_of_the_checkpoints_is_refused(make_cfg, tmp_path):
    tmp_path.joinpath("checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints is no folder"):
        train.train(make_cfg(), tmp_path)


def test_two_trainings_do_not_share_a_folder(make_cfg, tmp_path, fed):
    def again():
        with pytest.raises(UserError, match="another `soup-jax train` is at work in "):
            train.train(make_cfg(), tmp_path)

    fed.at = {3: again}
    assert int(train.train(make_cfg(), tmp_path).step) == 12


def test_a_loss_that_grew_beyond_all_bounds_is_a_divergence(make_cfg, tmp_path):
    cfg = make_cfg(**{"optimizer.learning_rate": 30.0, "optimizer.schedule": "constant"})
    with pytest.raises(
        FloatingPointError, match=r"is \S+ nats, more than 17\.97[\s\S]*another --workdir and"
    ):
        train.train(cfg, tmp_path)


def test_a_run_that_diverged_at_its_end_is_never_finished(make_cfg, tmp_path):
    fields = {"optimizer.learning_rate": 30.0, "optimizer.schedule": "constant"}
    cfg = make_cfg(**fields, **{"log.every_steps": 1000})
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="steps before step 12 is"):
            train.train(cfg, tmp_path)
    with Checkpointer(tmp_path / "checkpoints") as reader:
        assert reader.steps()[-1] == 8


def test_steps_before_a_damaged_window_are_saved(make_cfg, undisturbed, tmp_path, monkeypatch):
    from soup_jax.data.corpus import Corpus

    read, calls = Corpus.read_windows, []

    def damaged(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise UserError("windows/x is damaged")
        return read(*arguments)

    monkeypatch.setattr(Corpus, "read_windows", damaged)
    cfg = make_cfg(**{"loader.num_threads": 1})
    with pytest.raises(UserError, match=r"x is damaged\. Step 6 is saved; the same command"):
        train.train(cfg, tmp_path)
    with Checkpointer(tmp_path / "checkpoints") as reader:
        assert reader.steps()[-1] == 6
    monkeypatch.undo()
    state, whole = undisturbed()
    assert_same_state(train.train(cfg, tmp_path, accept_changes=True), state)
    assert lines_of(tmp_path) == lines_of(whole)


def test_steps_before_an_evaluation_without_room_are_saved(
    make_cfg, tiny_text, tmp_path, monkeypatch
):
    def evaluate(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    cfg = make_cfg(**evaluating(tiny_text), **{"checkpoint.every_steps": 0})
    with pytest.raises(jax.errors.JaxRuntimeError):
        train.train(cfg, tmp_path)
    with Checkpointer(tmp_path / "checkpoints") as reader:
        (step,) = reader.steps()
        assert reader.data(step)["evaluation_due"]  # it is made up by the next start


def test_a_network_may_begin_with_a_large_loss(make_cfg, tmp_path):
    def large(key):
        params = whole.init(key)
        return {**params, "embedding": 100 * params["embedding"]}

    cfg = make_cfg(**{"optimizer.learning_rate": 1e-6})
    whole = build.base_model(cfg)
    model = dataclasses.replace(whole, init=large)
    assert int(train.train(cfg, tmp_path, model=model).step) == 12
    assert min(line["loss"] for line in lines_of(tmp_path)) > 3 * np.log(cfg.vocab_size)


def test_the_limit_of_the_loss_is_that_of_the_first_step_or_of_guessing():
    assert divergence.limit(400, 6.0)[0] == divergence.limit(400, None)[0] == 3 * np.log(400)
    assert divergence.limit(400, 100.0) == (150.0, "1.5 times the loss of the first step")


@pytest.mark.parametrize("state", [None, {"sums": {}, "steps": 2, "wait": 0.0, "seconds": 1.0}])
def test_a_meter_of_an_earlier_version_takes_the_first_loss_that_it_sees(state):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("replica", "fsdp"))
    meter = Meter(mesh, 6)
    meter.restore(state, None, step=4)
    meter.note_first()  # nothing was summed yet
    assert meter.first_loss is None
    meter.sums = {**meter.sums, "domain_loss": jnp.ones(6), "domain_targets": jnp.full(6, 2.0)}
    meter.note_first()
    meter.sums = meter.sums | {"domain_loss": jnp.zeros(6)}
    meter.note_first()
    assert meter.state() == {"first_loss": 0.5}


def test_a_last_interval_that_is_shorter_has_a_line(make_cfg, tmp_path):
    train.train(make_cfg(**{"log.every_steps": 1000}), tmp_path)
    (line,) = lines_of(tmp_path)
    assert (line["step"], line["steps"]) == (12, 12)


def test_a_run_whose_documents_see_no_other(make_cfg, undisturbed, tmp_path):
    train.train(make_cfg(**{"model.attention_reset": 0}), tmp_path / "reset")
    runs = (tmp_path / "reset", undisturbed()[1])
    reset, whole = (lines_of(run)[-1]["loss"] for run in runs)
    assert reset != whole
    assert abs(reset - whole) < 0.5
    specialist = open_lib.load(tmp_path / "reset").instantiate(["flour and butter"])
    assert len(specialist.generate("flour", max_tokens=5, temperature=0)) > 0
    score = specialist.score(["flour and butter", "a sail"])
    alone = [specialist.score([text])[0] for text in ("flour and butter", "a sail")]
    assert [s.nats for s in score] == pytest.approx([s.nats for s in alone], abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer.warmup_steps": 12}, "warmup_steps = 12 must be below num_steps = 12"),
        (
            {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 6, "optimizer.decay_steps": 8},
            "warmup_steps = 6 and decay_steps = 8 are more than num_steps = 12",
        ),
        ({"seed": 1 << 32}, r"seed = 4294967296 must be below 2\^32"),
        ({"evaluate.specialists": ("nothing*",)}, r"no specialist file matches 'nothing\*'"),
        (
            {"corpus.text_field": "foo", "corpus.min_chars": 777},
            "prepared with 1;.*prepared with .text.",
        ),
        ({"tokenizer.path": "/nonexistent"}, "/nonexistent does not exist"),
        ({"experts.rules": ((".*", "dense"), ("embedding", "none"))}, "applies to no leaf"),
        (
            {
                "domain_weights.sparse": 0.3,
                "domain_weights.file": 0.5,
                "domain_weights.path": "/proc",
            },
            "/proc is a folder",
        ),
        ({"corpus.min_chars": 9, "corpus.max_chars": 8}, "at most corpus.max_chars = 8"),
        ({"domain_weights.support_exponent": 1e9}, "support_exponent = 1e[+]09 is too large"),
        ({"model.attention_reset": 5}, "attention_reset = 5, documents end with 0"),
    ],
)
def test_settings_that_contradict_are_refused_before_work(fields, message, make_cfg, tmp_path):
    with pytest.raises(UserError, match=message):
        train.train(make_cfg(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_host_is_never_more_than_two_steps_ahead(make_cfg, tmp_path, monkeypatch):
    # However rarely it logs: the watchdog must not take a long interval for a hang.
    ready, compiled = [], train.compile_together

    def spied(*arguments):
        step, sent = compiled(*arguments), []

        def spy(state, sums, batch):
            ready.append([x.is_ready() for x in sent[:-2]])
            state, sums = step(state, sums, batch)
            sent.append(sums["steps"])
            return state, sums

        return spy

    monkeypatch.setattr(train, "compile_together", spied)
    rare = {"log.every_steps": 1000, "checkpoint.every_steps": 0, "num_steps": 20}
    train.train(make_cfg(**rare), tmp_path / "run")
    assert len(ready) == 20
    assert all(all(steps) for steps in ready)
