"""Sweeps: their points, the pool, a sweep that is killed and goes on, and the table."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import tiny_config

from soup_jax.cli import config_flag, main, sweep_worker
from soup_jax.cli import sweep as sweep_cli
from soup_jax.config import schema
from soup_jax.errors import UserError
from soup_jax.sweeps import points, pool, table, work
from soup_jax.training import metrics

RATE, SEED = "optimizer.learning_rate", "seed"


# ------------------------------------------------------------------------------------------ points


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        (RATE, "3e-3,1", [0.003, 1]),
        (SEED, "0, 1,2", [0, 1, 2]),
        ("optimizer.schedule", "cosine,wsd", ["cosine", "wsd"]),
        ("name", "1,2", ["1", "2"]),
        ("name", "'a,b','c'", ["a,b", "c"]),
        ("model.tie_embeddings", "true,False", [True, False]),
        ("skip_batches", "((1, 2),),()", [((1, 2),), ()]),
    ],
)
def test_values_of_an_axis(name, text, values):
    assert points.axis(name, text) == values


@pytest.mark.parametrize("text", ["", "fast", "1,,2", "1],[2", "0:3", "open('x')"])
def test_an_axis_of_no_values_is_refused(text):
    with pytest.raises(UserError, match=f"--sweep.{SEED}=.* must be one or more values"):
        points.axis(SEED, text)


def test_the_product_keeps_the_order_and_the_list():
    axes = {RATE: [0.1, 0.2], SEED: [0, 1]}
    assert [tuple(x.values()) for x in points.product([{}], axes)] == [
        (0.1, 0),
        (0.1, 1),
        (0.2, 0),
        (0.2, 1),
    ]
    assert points.product([{"name": "a"}, {"name": "b"}], {SEED: [3]}) == [
        {"name": "a", SEED: 3},
        {"name": "b", SEED: 3},
    ]
    with pytest.raises(UserError, match=r"seed is in get_sweep\(\) and in --sweep\.seed"):
        points.product([{SEED: 1}], {SEED: [2]})
    with pytest.raises(UserError, match="has 1,000,000 points"):
        points.product([{}], {SEED: range(1000), RATE: range(1000)})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([{}, {"optimizer.learning_rte": 1.0}], "point 2 of 2 .* unknown field .*did you mean"),
        ([{SEED: 1.5}], r"point 1 of 1 \(seed = 1.5\): seed = 1.5 is a float, expected a int"),
        ([{RATE: "fast"}], "is a str, expected a float"),
        ([{RATE: -1.0}], r"point 1 of 1 .*: config: optimizer\.learning_rate = -1.0 must be"),
        ([{"optimizer.schedule": "fast"}], "is none of"),
        ([{"num_mixtures": 5}], "num_mixtures = 5 must divide batch_size"),
        ([{"num_steps": 2}], "warmup_steps = 2 must be below num_steps"),
        ([{RATE: 0.1}, {RATE: 1e-1}], "point 2 of 2 .* has the same config as point 1"),
        ([{SEED: 0}, {}], r"point 2 of 2 \(the config itself\) has the same config as point 1"),
    ],
)
def test_every_point_is_checked_before_the_first(overrides, says):
    with pytest.raises(UserError, match=says):
        points.check(tiny_config(), overrides)


def test_a_point_is_the_config_with_its_overrides():
    base = tiny_config()
    (first, one), (second, _) = points.check(base, [{SEED: 1, RATE: 1}, {"name": "a b"}])
    assert schema.diff(base, one) == {SEED: (0, 1), RATE: (base.optimizer.learning_rate, 1.0)}
    assert base.seed == 0
    assert first.name == "optimizer.learning_rate=1.0,seed=1"
    assert second.name.startswith("name=a-b-")


def test_numbers_of_numpy_are_taken_as_numbers():
    ((point, _),) = points.check(tiny_config(), [{RATE: np.float64(0.001), SEED: np.int64(3)}])
    assert point.arguments == ["--config.optimizer.learning_rate=0.001", "--config.seed=3"]
    assert {type(x) for x in point.overrides.values()} == {float, int}
    assert point.name == "optimizer.learning_rate=0.001,seed=3"


def test_names_are_safe_short_and_told_apart():
    overrides = [
        {},
        {"name": "a/b"},
        {"name": "a?b"},
        {"name": "a", "corpus.dir": "x"},
        {"name": "a,corpus.dir=x"},
        {"name": "x" * 400},
        {"name": "x" * 401},
        {"name": "é"},
        {"skip_batches": ((1, 2),)},
    ]
    names = [points.name_of(o) for o in overrides]
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert len(name) <= 120
        assert shlex.quote(name) == name or "," in name
        assert name.isascii()
        assert "/" not in name
    assert points.name_of({"b": 1, "a": 2}) == points.name_of({"a": 2, "b": 1}) == "a=2,b=1"


def test_the_flags_of_a_point_give_its_values(tmp_path):
    overrides = {
        RATE: 1e-05,
        SEED: 7,
        "model.tie_embeddings": False,
        "name": "a b=c,'d'",
        "skip_batches": ((1, 2), (4, 4)),
        "evaluate.specialists": ("a*.jsonl", "b"),
        "corpus.sources": (),
        "tokenizer.path": "",
    }
    (point, expected), *_ = points.check(tiny_config(), [overrides])
    (tmp_path / "tiny.py").write_text(CONFIG.format(flat=dict(schema.flat_items(tiny_config()))))
    words = ["", f"--config={tmp_path / 'tiny.py'}", *point.arguments]
    flags = config_flag.flags.FlagValues()
    config_flag.define(flags, words)
    assert flags(words) == [""]
    assert not schema.diff(config_flag.checked(flags), expected)


def test_what_is_saved_is_read_back(tmp_path):
    made = [p for p, _ in points.check(tiny_config(), [{SEED: 3}, {"skip_batches": ((1, 2),)}])]
    sweep = points.Sweep(["soup-jax", "sweep"], ["--config=c.py"], made, ["seed=9"])
    points.save(sweep, tmp_path)
    assert points.load(tmp_path) == sweep
    with pytest.raises(UserError, match="is no sweep"):
        points.load(tmp_path / "none")


# -------------------------------------------------------------------------------------------- pool

# Answers as a worker does, by the first word of the first command.
WORKER = """
import json, os, signal, sys, time
for line in sys.stdin:
    word, *rest = json.loads(line)["commands"][0]
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(print(0, flush=True)))
        open(rest[0], "w").close()
        time.sleep(60)
    if word == "where":
        where = os.getpid(), sys.argv[1], os.environ.get("CUDA_VISIBLE_DEVICES")
        print(*where, file=open(rest[0], "w"))
    print(rest[0] if word == "status" else 0, flush=True)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "a_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "a_worker"


def done(pool_, *commands):
    """{first word and argument: status} of the jobs that ended."""
    jobs = [pool.Job(" ".join(c), [list(c)], pathlib.Path("log")) for c in commands]
    ended = {}
    pool_.run(
        jobs, started=lambda _: None, ended=lambda job, status: ended.update({job.name: status})
    )
    return ended


def test_a_job_that_fails_or_kills_its_worker_ends_no_other(worker, tmp_path):
    two = pool.Pool([pool.Slot(), pool.Slot(cores=(0, 1))], worker)
    commands = [("status", "0"), ("die",), ("status", "2"), ("status", "70"), ("die",)]
    commands += [("where", str(tmp_path / "where"))]
    ended = done(two, *commands)
    assert list(ended.values()) == [ended[" ".join(c)] for c in commands] or len(ended) == 5
    assert ended["die"] == -signal.SIGKILL
    assert ended["status 2"] == 2
    assert ended["status 70"] == 70
    assert ended[f"where {tmp_path / 'where'}"] == 0
    assert not two.stopped


def test_what_a_start_or_an_end_raises_ends_no_other_job(worker):
    one, ended = pool.Pool([pool.Slot()], worker), []

    def start(job):
        if job.name == "1":
            raise OSError(28, "No space left on device")

    def end(job, status):
        if job.name == "2":
            raise UserError("outcome.json is damaged")
        ended.append((job.name, status))

    jobs = [pool.Job(str(i), [["status", "0"]], pathlib.Path("log")) for i in range(4)]
    one.run(jobs, started=start, ended=end)
    assert ended == [("0", 0), ("3", 0)]
    assert {name: type(e) for name, e in one.errors.items()} == {"1": OSError, "2": UserError}


def test_one_worker_does_many_jobs_where_its_slot_says(worker, tmp_path):
    slot = pool.Slot({"CUDA_VISIBLE_DEVICES": "3"}, cores=(1, 2))
    done(pool.Pool([slot], worker), *(("where", str(tmp_path / name)) for name in "ab"))
    first, second = ((tmp_path / name).read_text() for name in "ab")
    assert first == second
    assert first.split()[1:] == ["1,2", "3"]


def test_a_signal_goes_to_the_workers_and_leaves_the_rest_undone(worker, tmp_path):
    one = pool.Pool([pool.Slot()], worker)

    def stop():
        while not (tmp_path / "waits").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    assert done(one, ("wait", str(tmp_path / "waits")), ("status", "0")) == {}
    thread.join()
    assert one.stopped == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("found", "jobs", "share", "expected"),
    [
        (("gpu", ["0", "1", "2", "3"]), 0, 0, ["0", "1", "2", "3"]),
        (("gpu", ["4", "5", "6", "7"]), 2, 0, ["4,5", "6,7"]),
        (("gpu", ["0", "1", "2", "3"]), 0, 2, ["0,1", "2,3"]),
        (("gpu", ["0", "1", "2", "3"]), 1, 2, ["0,1"]),
        (("tpu", []), 0, 0, [None]),
        (("tpu", []), 2, 0, "at most 1 can work"),
        (("gpu", ["0"]), 2, 0, "at most 1 can work"),
        (("gpu", ["0"]), 0, 2, "there are 1 GPUs here"),
    ],
)
def test_slots_of_accelerators(monkeypatch, found, jobs, share, expected):
    monkeypatch.setattr(pool, "_accelerators", lambda: found)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            pool.slots(jobs, 9, devices_per_job=share)
        return
    slots = pool.slots(jobs, 9, devices_per_job=share)
    assert [slot.env.get("CUDA_VISIBLE_DEVICES") for slot in slots] == expected
    assert all(slot.cores == () for slot in slots)


@pytest.mark.parametrize(("jobs", "expected"), [(0, ["0"]), (4, ["0"]), (2, ["0,1"])])
def test_fewer_points_than_gpus_leave_some_idle(monkeypatch, jobs, expected):
    monkeypatch.setattr(pool, "_accelerators", lambda: ("gpu", ["0", "1", "2", "3"]))
    found = [slot.env["CUDA_VISIBLE_DEVICES"] for slot in pool.slots(jobs, 1)]
    assert found == expected


def test_the_default_number_of_jobs_is_what_a_container_and_its_memory_allow(monkeypatch):
    monkeypatch.setattr(pool, "_accelerators", lambda: ("", []))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(pool.joblib, "cpu_count", lambda: 16)
    for free, expected in ((sys.maxsize, 16), (9 << 30, 4), (1 << 30, 1)):
        monkeypatch.setattr(pool, "_free_memory", lambda free=free: free)
        assert len(pool.slots(0, 99)) == expected
        assert len(pool.slots(20, 99)) == 20


def test_slots_of_cores(monkeypatch):
    monkeypatch.setattr(pool.joblib, "cpu_count", lambda: 4)
    monkeypatch.setattr(pool, "_free_memory", lambda: sys.maxsize)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {8, 3, 5, 7}, raising=False)
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    assert [s.cores for s in pool.slots(0, 9)] == [(3,), (5,), (7,), (8,)]
    assert {s.env["PJRT_NPROC"] for s in pool.slots(0, 9)} == {"4"}
    assert [s.cores for s in pool.slots(2, 9)] == [(3, 5), (7, 8)]
    assert [s.cores for s in pool.slots(0, 2)] == [(3, 5), (7, 8)]
    assert [s.cores for s in pool.slots(1, 9)] == [()]
    assert [s.cores for s in pool.slots(5, 9)] == [()] * 5


def test_a_run_that_a_signal_stopped_is_not_scored(tmp_path, monkeypatch):
    carried = []
    monkeypatch.setattr(main, "run", lambda words: carried.append(words) or 0)
    monkeypatch.setattr(sweep_worker, "_forget", lambda: None)
    commands = [["train"], ["evaluate"]]
    request = {"commands": commands, "needs": str(tmp_path / "12")}
    assert sweep_worker._carry_out(**request) == 0
    assert carried == [["train"]]
    (tmp_path / "12").mkdir()
    assert sweep_worker._carry_out(**request) == 0
    assert carried[1:] == commands


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


def one_point(workdir, *, evaluate=True, **fields):
    """(the work, the point, its config) of a sweep of one point."""
    fields.setdefault("evaluate.specialists", ("*.jsonl",))
    (pair,) = points.check(tiny_config(**fields), [{SEED: 1}])
    sweep = points.Sweep([], ["--config=c.py"], [pair[0]], [])
    made = work.Work(sweep, workdir, worker="", evaluate=evaluate, retry_failed=False)
    return made, *pair


def test_a_score_of_a_step_before_the_last_counts_for_nothing(tmp_path):
    made, point, cfg = one_point(tmp_path)
    job = made._job(point, cfg)
    assert [words[0] for words in job.commands] == ["train", "evaluate"]
    assert job.needs == str(tmp_path / point.name / "checkpoints" / str(cfg.num_steps))
    folder = tmp_path / point.name
    folder.mkdir()
    schema.save(cfg, folder / "config.json")
    table.record(folder, state="done", seconds=1.0)
    for step, scored in ((cfg.num_steps - 1, False), (cfg.num_steps, True)):
        score = {"average": {"specialist": {"loss": 2.0}}, "runs": {"specialist": {"step": step}}}
        (folder / "evaluation_tuning.json").write_text(json.dumps(score))
        job = made._job(point, cfg)
        assert (job is None) == scored
        assert scored or [words[0] for words in job.commands] == ["evaluate"]
        (found,) = table.rows(made.sweep, tmp_path)
        assert found.numbers == ({"specialist": 2.0} if scored else {})


def test_points_may_set_what_the_base_config_lacks(tmp_path, tiny_corpus, capsys):
    config = pathlib.Path(__file__).parents[1] / "experiments" / "paper" / "methods.py"
    command = ["sweep", f"--config={config}:fixed", f"--workdir={tmp_path}", "--dry_run"]
    sizes = {"corpus.dir": tiny_corpus, "vocab_size": 400, "seq_len": 32, "num_domains": 6}
    sizes |= {"domain_weights.support_size": 6}
    command += [points.argument(name, value) for name, value in sizes.items()]
    paths = [tmp_path / f"{k}.json" for k in range(2)]
    for k, path in enumerate(paths):
        path.write_text(json.dumps(np.eye(6)[k].tolist()))
    assert main.run([*command, f"--sweep.domain_weights.path={paths[0]},{paths[1]}"]) == 0
    assert f"--config.domain_weights.path={paths[1]}" in capsys.readouterr().out
    assert main.run([*command, "--sweep.seed=0,1"]) == 2
    assert "point 1 of 2 (seed = 0)" in capsys.readouterr().err


def test_a_point_whose_config_was_edited_since_it_was_checked_is_not_trained(tmp_path, capsys):
    made, point, cfg = one_point(tmp_path)
    file = tmp_path / "c.py"
    made.sweep.train[:] = [f"--config={file}"]
    job = made._job(point, cfg)
    edited = tiny_config(**{RATE: 0.5, "evaluate.specialists": ("*.jsonl",)})
    file.write_text(CONFIG.format(flat=dict(schema.flat_items(edited))))
    with config_flag.expected(job.config):
        assert main.run(job.commands[0]) == 2
    told = "its config is not what was checked when the sweep began"
    changed = f"{RATE} {cfg.optimizer.learning_rate} -> 0.5"
    assert f"{told}: {file} was edited meanwhile: {changed}\n" in capsys.readouterr().err
    assert not (tmp_path / point.name).exists()


def test_the_config_that_was_checked_is_taken(tmp_path):
    made, point, cfg = one_point(tmp_path, name="a = b")
    base = tiny_config(**{"name": "a = b", "evaluate.specialists": ("*.jsonl",)})
    (tmp_path / "c.py").write_text(CONFIG.format(flat=dict(schema.flat_items(base))))
    words = ["", f"--config={tmp_path / 'c.py'}", *point.arguments]
    flags = config_flag.flags.FlagValues()
    config_flag.define(flags, words)
    flags(words)
    with config_flag.expected(made._job(point, cfg).config):
        assert not schema.diff(config_flag.checked(flags), cfg)


def scored_point(workdir, made, point, cfg, **outcome):
    """The folder of a point that is done and has a score."""
    folder = workdir / point.name
    (folder / "checkpoints" / str(cfg.num_steps)).mkdir(parents=True, exist_ok=True)
    schema.save(cfg, folder / "config.json")
    table.record(folder, **{"state": "done", "seconds": 1.0, **outcome})
    runs = {"specialist": {"step": cfg.num_steps}}
    score = {"average": {"specialist": {"loss": 2.0}}, "runs": runs}
    (folder / "evaluation_tuning.json").write_text(json.dumps(score))
    return folder


def test_a_score_by_other_documents_or_settings_is_made_again(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("{}")
    old = {"evaluate.specialists": (str(tmp_path / "a.jsonl"),)}
    made, point, cfg = one_point(tmp_path, **old)
    first = work.scoring(cfg)
    made.sweep.scoring[point.name] = first
    scored_point(tmp_path, made, point, cfg, scoring=first)
    assert made._job(point, cfg) is None
    assert table.rows(made.sweep, tmp_path)[0].numbers == {"specialist": 2.0}
    for changed, words in (
        ({"evaluate.specialists": (str(tmp_path / "[ab].jsonl"),)}, ["evaluate"]),
        ({"evaluate.tuning_fraction": 0.3}, ["train", "evaluate"]),
    ):
        made, point, cfg = one_point(tmp_path, **{**old, **changed})
        made.sweep.scoring[point.name] = work.scoring(cfg)
        assert work.scoring(cfg) != first
        assert [c[0] for c in made._job(point, cfg).commands] == words
        assert table.rows(made.sweep, tmp_path)[0].numbers == {}
    _, _, same = one_point(tmp_path, **old, **{"evaluate.every_steps": 3, RATE: 0.5})
    assert work.scoring(same) == first
    (tmp_path / "a.jsonl").write_text("{}\n{}")
    assert work.scoring(same) != first


def test_a_score_of_an_earlier_version_which_did_not_say_by_what_is_made_again(tmp_path):
    made, point, cfg = one_point(tmp_path)
    folder = scored_point(tmp_path, made, point, cfg)
    (folder / "outcome.json").write_text('{"state": "done", "seconds": 1, "error": ""}')
    made.sweep.scoring[point.name] = "new"
    assert [c[0] for c in made._job(point, cfg).commands] == ["evaluate"]


def test_a_point_that_has_begun_on_another_corpus_is_refused(tmp_path, tiny_corpus):
    _, point, cfg = one_point(tmp_path, **{"corpus.dir": tiny_corpus, "evaluate.specialists": ()})
    work.check_runs([(point, cfg)], tmp_path)
    (tmp_path / point.name / "domains").mkdir(parents=True)
    (tmp_path / point.name / "domains" / "map.json").write_text('{"fingerprint": "old"}')
    with pytest.raises(UserError, match=r"point seed=1: .* holds a run of another corpus than"):
        work.check_runs([(point, cfg)], tmp_path)


def test_a_point_whose_evaluation_fails_stays_done_with_its_numbers(tmp_path, capsys):
    made, point, cfg = one_point(tmp_path)
    made.sweep.scoring[point.name] = "new"
    folder = scored_point(tmp_path, made, point, cfg, scoring="old")
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 12, "loss": 3.0}\n')
    job = made._job(point, cfg)
    made._started(job)
    with job.log.open("a") as log:
        log.write("soup-jax: error: no such documents\n")
    made._ended(job, 2)
    (found,) = table.rows(made.sweep, tmp_path)
    assert (found.state, found.error) == ("done", "evaluation failed: no such documents")
    assert found.numbers == {"loss": 3.0}
    assert table.text([found], {}, "loss").splitlines()[1].endswith("evaluation failed")
    assert (
        sweep_cli._tell(
            made.sweep, tmp_path, "", table.rows(made.sweep, tmp_path), only=[(point, cfg)]
        )
        == 1
    )
    err = capsys.readouterr().err
    assert "1 of 1 points are trained and not scored" in err
    assert "seed=1: evaluation failed: no such documents (" in err
    made._ended(made._job(point, cfg), 0)
    assert table.outcome(folder)["scoring"] == "new"
    assert (
        sweep_cli._tell(
            made.sweep, tmp_path, "", table.rows(made.sweep, tmp_path), only=[(point, cfg)]
        )
        == 0
    )


def test_a_point_whose_end_cannot_be_noted_has_failed_with_the_reason(tmp_path, monkeypatch):
    made, point, _ = one_point(tmp_path)
    full = OSError(28, "No space left on device", "outcome.json")
    (tmp_path / point.name).mkdir()
    made._note({point.name: full})
    (found,) = table.rows(made.sweep, tmp_path, made.errors)
    assert (found.state, made.errors) == ("failed", {})
    assert "the disk is full" in found.error
    monkeypatch.setattr(table, "record", raises(full))
    made._note({point.name: UserError("full")})
    (found,) = table.rows(made.sweep, tmp_path, made.errors)
    assert (found.state, found.error) == ("failed", "full")
    monkeypatch.undo()
    (tmp_path / point.name / "outcome.json").write_text("{")
    (found,) = table.rows(made.sweep, tmp_path)
    assert found.state == "failed"
    assert "outcome.json is not valid JSON" in found.error


# --------------------------------------------------------------------------------------- the table


def row(state="done", seconds=1.0, error="", numbers=None, **overrides):
    point = points.Point(points.name_of(overrides), overrides)
    return table.Row(point, state, numbers or {}, seconds, error)


def test_the_table_is_sorted_and_averages_over_seeds():
    losses = {(0.1, 0): 2.0, (0.1, 1): 3.0, (0.2, 0): 2.2, (0.2, 1): 2.4, (0.3, 0): 1.0}
    rows = [row(numbers={"loss": x}, **{RATE: r, SEED: s}) for (r, s), x in losses.items()]
    rows.append(row("failed", error="no\nluck", **{RATE: 0.3, SEED: 1}))
    names = {RATE: "learning_rate", SEED: "seed"}
    lines = table.text(rows, names, "loss").splitlines()
    assert lines[0].split() == ["learning_rate", "seed", "loss*", "time"]
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["0.3", "0", "1.0000"],
        ["0.1", "0", "2.0000"],
        ["0.2", "0", "2.2000"],
    ]
    assert lines[6].split() == ["0.3", "1", "1", "s", "failed"]
    # One seed of the third rate is missing, so its mean decides nothing.
    assert [line.split() for line in lines[-3:]] == [
        ["0.2", "2.3000", "0.1414", "2"],
        ["0.1", "2.5000", "0.7071", "2"],
        ["0.3", "1.0000", "1"],
    ]
    assert table.best(rows, "loss").point.overrides == {RATE: 0.2, SEED: 0}
    assert table.best(rows[-1:], "loss") is None
    assert table.best(rows[:1], "loss") is rows[0]


def test_the_best_is_of_the_first_group_where_one_has_the_overrides_of_another_and_more():
    losses = {(None, 0): 2.0, (None, 1): 2.2, (8, 0): 1.0, (8, 1): 9.0}
    more = {None: {}, 8: {"num_experts": 8}}
    rows = [row(numbers={"loss": x}, seed=s, **more[e]) for (e, s), x in losses.items()]
    assert table.over_seeds(rows, "loss")[0].overrides == {}
    assert table.best(rows, "loss").point.overrides == {SEED: 0}


def test_the_metric_is_one_that_all_finished_points_have():
    both, one = {"loss": 1.0, "validation": 2.0}, {"loss": 1.0}
    rows = [row(numbers=both), row("failed", seed=1)]
    assert table.choose_metric(rows) == "validation"
    assert table.choose_metric([*rows, row(numbers=one, seed=2)]) == "loss"
    assert table.choose_metric(rows, "loss") == "loss"
    assert table.choose_metric([]) == "specialist"
    with pytest.raises(UserError, match="no point has it; --evaluate"):
        table.choose_metric(rows, "specialist")


def test_a_loss_that_is_not_finite_comes_last():
    rows = [row(numbers={"loss": float("nan")}), row(numbers={"loss": 9.0}, seed=1)]
    assert table.ranked(rows, "loss")[0] is rows[1]
    assert table.best(rows, "loss") is rows[1]


# ----------------------------------------------------------------------------------- a whole sweep

CONFIG = """
from soup_jax.experiments import base

def get_config():
    cfg = base.get_config()
    cfg.update_from_flattened_dict({flat!r})
    return cfg

def get_sweep():
    return [{{"optimizer.learning_rate": rate}} for rate in (0.003, 1e30, 0.01)]
"""
GOOD, BAD, LAST = (f"{RATE}={rate}" for rate in ("0.003", "1e+30", "0.01"))


@pytest.fixture(scope="module")
def swept(tiny_text, tiny_corpus, tmp_path_factory):
    """(folder, environment, the process of the second command): the first was killed in its first
    point."""
    here = tmp_path_factory.mktemp("sweep")
    fields = {
        "corpus.dir": tiny_corpus,
        "checkpoint.every_steps": 2,
        "evaluate.specialists": (str(tiny_text / "cooking.jsonl"),),
    }
    flat = dict(schema.flat_items(tiny_config(**fields)))
    (here / "tiny.py").write_text(CONFIG.format(flat=flat))
    command = [sys.executable, "-m", "soup_jax.cli", "sweep", "--config=tiny.py", "--evaluate"]
    command += ["--workdir=sweep", "--jobs=1"]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    env = {**os.environ, "XLA_FLAGS": flags}
    first = subprocess.Popen(command, cwd=here, env=env)
    for _ in range(1200):
        if (here / "sweep" / GOOD / "checkpoints" / "2").exists() or first.poll() is not None:
            break
        time.sleep(0.05)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    second = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False)
    return here, env, second


def numbers(run):
    """The lines of metrics without times."""
    lines = metrics.read_metrics(run / "metrics.jsonl")
    times = ("step_ms", "data_wait_ms", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def test_a_killed_sweep_goes_on_where_it_was(swept):
    here, *_ = swept
    log = (here / "sweep" / GOOD / "log.txt").read_text()
    assert log.count("+ soup-jax train") == 2
    assert log.count("starting at step") == 2, log
    assert (here / "sweep" / GOOD / "checkpoints" / "12").is_dir()
    assert (here / "sweep" / LAST / "checkpoints" / "12").is_dir()


def test_a_run_of_a_sweep_says_by_which_command_it_was_made(swept):
    here, *_ = swept
    *_, last = (here / "sweep" / LAST / "starts.jsonl").read_text().splitlines()
    words = json.loads(last)["command"]
    assert words[:3] == ["soup-jax", "train", "--config=tiny.py"]
    assert f"--config.{LAST}" in words
    score = json.loads((here / "sweep" / LAST / "evaluation_tuning.json").read_text())
    assert score["command"][:3] == ["soup-jax", "evaluate", f"--workdir=sweep/{LAST}"]


def test_a_point_that_fails_is_told_and_the_others_go_on(swept):
    here, _, second = swept
    assert second.returncode == 1
    assert f"{BAD}: loss or gradient of step" in second.stderr
    assert f"sweep/{BAD}/log.txt" in second.stderr
    assert "1 of 3 points failed; --retry_failed" in second.stderr
    assert "Traceback" not in second.stderr
    states = {p: table.outcome(here / "sweep" / p)["state"] for p in (GOOD, BAD, LAST)}
    assert states == {GOOD: "done", BAD: "failed", LAST: "done"}


def test_a_point_has_the_bits_of_the_same_config_by_train(swept):
    """One was killed and resumed, the other came third in its process."""
    here, env, _ = swept
    alone = [["train", "--config=tiny.py", f"--config.{p}", f"--workdir={p}"] for p in (LAST, GOOD)]
    program = f"from soup_jax.cli import main\nfor words in {alone}: main.run(words)"
    subprocess.run([sys.executable, "-c", program], cwd=here, env=env, check=True)
    for point in (GOOD, LAST):
        assert numbers(here / point) == numbers(here / "sweep" / point)
        assert len(numbers(here / point)) == 3


def test_the_table_the_picture_and_the_best_command(swept, monkeypatch, capsys):
    here, _, second = swept
    monkeypatch.chdir(here)
    assert main.run(["sweep", "--workdir=sweep", "--table"]) == 1
    out = capsys.readouterr().out
    assert out in second.stdout
    assert (here / "sweep" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    lines = [x.split("\t") for x in (here / "sweep" / "table.tsv").read_text().splitlines()]
    assert lines[0][:3] == ["point", RATE, "state"]
    first, *_ = [dict(zip(lines[0], line)) for line in lines[1:]]
    evaluated = json.loads((here / "sweep" / first["point"] / "evaluation_tuning.json").read_text())
    assert float(first["specialist"]) == evaluated["average"]["specialist"]["loss"]
    assert f"{float(first['specialist']):.4f}" in out
    assert f"best by specialist, {first['point']}" in out
    command = shlex.split(out.splitlines()[-1])
    assert command[:3] == ["soup-jax", "train", "--config=tiny.py"]
    assert f"--config.{first['point']}" in command
    assert "--workdir=sweep-best" in command


def test_what_is_done_is_not_done_again(swept, monkeypatch, capsys, caplog):
    here, *_ = swept
    monkeypatch.chdir(here)
    monkeypatch.setattr(work.pool.Pool, "run", None)  # no worker is started
    command = ["sweep", "--config=tiny.py", "--workdir=sweep", "--evaluate"]
    assert main.run(command) == 1
    assert "1 of 3 points failed" in capsys.readouterr().err
    assert main.run([*command, "--config.num_steps=50"]) == 2
    assert "holds a run with another config" in capsys.readouterr().err
    saved = points.load(here / "sweep")
    assert [p.name for p in saved.points] == [GOOD, BAD, LAST]
    assert saved.earlier == []
    with monkeypatch.context() as m:
        m.setattr(work.Work, "run", lambda *_, **__: "")
        assert main.run([*command, "--sweep.seed=5"]) == 0
    saved = points.load(here / "sweep")
    assert [p.name for p in saved.points] == [f"{p},seed=5" for p in (GOOD, BAD, LAST)]
    assert saved.earlier == [GOOD, BAD, LAST]


def test_shards_train_all_points_once_and_tell_their_own_failures(swept, monkeypatch, capsys):
    here, *_ = swept
    monkeypatch.chdir(here)
    trained = []
    monkeypatch.setattr(work.Work, "run", lambda _, mine, **__: trained.append(mine) or "")
    command = ["sweep", "--config=tiny.py", "--workdir=sweep"]
    statuses = [main.run([*command, f"--shard={i}/2"]) for i in range(2)]
    assert [[point.name for point, _ in mine] for mine in trained] == [[GOOD, LAST], [BAD]]
    assert statuses == [0, 1]
    captured = capsys.readouterr()
    assert captured.out == "3 points\n3 points\n"
    assert "1 of 1 points failed" in captured.err
