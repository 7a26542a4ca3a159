"""Log lines: their arithmetic, and the files they go to."""

import errno
import json
import sys
import types

import numpy as np
import pytest

from soup_jax.errors import UserError
from soup_jax.experiments import base
from soup_jax.training import metrics, trackers
from soup_jax.training import step as train_step


def sums(**changes):
    values = {k: np.asarray(v) for k, v in train_step.zero_metrics(4).items()}
    return values | {k: np.asarray(v, np.float32) for k, v in changes.items()}


def test_summarize_weights_losses_by_targets_and_means_by_steps():
    line = metrics.summarize(
        sums(
            steps=4,
            grad_norm=6,
            grad_norm_max=3,
            learning_rate=0.5,
            targets=90,
            domain_rows=[2, 0, 1, 0],
            domain_loss=[30, 0, 60, 0],
            domain_targets=[60, 0, 30, 0],
        ),
        seconds=2.0,
        wait_seconds=1.0,
    )
    assert line["loss"] == 1.0
    assert line["grad_norm"] == 1.5
    assert line["grad_norm_max"] == 3.0
    assert line["learning_rate"] == 0.125
    assert line["step_ms"] == 500.0
    assert line["data_wait_ms"] == 250.0
    assert line["tokens_per_second"] == 45.0
    assert line["domains"] == {"0": [2, 0.5], "2": [1, 2.0]}
    assert json.loads(json.dumps(line)) == line


def test_summarize_of_no_step_is_finite():
    line = metrics.summarize(sums(), seconds=1.0, wait_seconds=0.0)
    assert line.pop("domains") == {}
    assert np.isfinite(list(line.values())).all()


def batch_hash(*plans):
    hashed = metrics.BatchHash()
    for domain, window in plans:
        hashed.add(np.asarray(domain), np.asarray(window))
    return hashed.hex()


def test_the_batch_hash_tells_records_and_their_order_apart():
    one, two = ([0, 1], [5, 6]), ([0, 1], [6, 5])
    hashes = [batch_hash(), batch_hash(one), batch_hash(two), batch_hash(one, two)]
    hashes += [batch_hash(two, one), batch_hash(([1, 0], [5, 6]))]
    assert len(set(hashes)) == len(hashes)
    assert all(len(h) == 16 for h in hashes)
    assert batch_hash(one, two) == hashes[3]


def test_peak_takes_the_longest_match():
    assert metrics.peak_tflops("TPU v5 lite") == 197.0
    assert metrics.peak_tflops("TPU v5") == 459.0
    assert metrics.peak_tflops("NVIDIA H200") == 989.0
    assert metrics.peak_tflops("cpu") == 0.0


def writer(folder, start=0, *, trackers=(), active=True):
    cfg = base.get_config()
    cfg.log.trackers = trackers
    return metrics.MetricsWriter(cfg, workdir=folder, start_step=start, active=active)


def write_steps(folder, start, steps, **changes):
    w = writer(folder, start, **changes)
    for step in steps:
        w.write(step, {"loss": float(step)})
    w.close()


def steps_of(folder):
    return [line["step"] for line in metrics.read_metrics(folder / "metrics.jsonl")]


def test_resume_drops_the_lines_of_steps_that_a_kill_undid(tmp_path):
    write_steps(tmp_path, 0, (2, 4, 6, 8))
    write_steps(tmp_path, 5, (6, 8, 10))
    assert steps_of(tmp_path) == [2, 4, 6, 8, 10]
    write_steps(tmp_path, 8, ())
    assert steps_of(tmp_path) == [2, 4, 6, 8]
    write_steps(tmp_path, 0, (1,))
    assert steps_of(tmp_path) == [1]


def test_a_writer_knows_which_lines_were_there_before(tmp_path):
    write_steps(tmp_path, 0, (2, 4))
    w = writer(tmp_path, 3)
    assert w.has(2, "train")
    assert not w.has(2, "evaluation")
    assert not w.has(4, "train")
    w.close()


@pytest.mark.parametrize(
    "tail", [b'{"step": 5, "ki', b'{"step": 5}', b"\x00\x00\x00", b"\xff\xfe\n", b"3\n", b"\n"]
)
def test_resume_drops_what_a_kill_left_half_written(tail, tmp_path):
    write_steps(tmp_path, 0, (2, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    write_steps(tmp_path, 6, (8,))
    assert steps_of(tmp_path) == [2, 4, 8]


def test_a_killed_run_is_read_without_its_half_line(tmp_path, capsys):
    write_steps(tmp_path, 0, (2, 4))
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 99, "ki')
    lines = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [v["step"] for v in lines] == [2, 4]
    assert "damaged" in capsys.readouterr().err


def test_a_line_in_which_a_digit_was_changed_is_dropped(tmp_path, capsys):
    w = writer(tmp_path)
    values = {"loss": 2.25, "ratio": 1 / 3, "name": "ü", "broken": float("nan"), "n": [1, 2.5e-30]}
    for step in (1, 2, 3):
        w.write(step, values)
    w.close()
    path = tmp_path / "metrics.jsonl"
    assert [v["ratio"] for v in metrics.read_metrics(path)] == [1 / 3] * 3
    text = path.read_text()
    path.write_text(text.replace("2.25", "2.26", 1))
    assert [v["step"] for v in metrics.read_metrics(path)] == [2, 3]
    assert "damaged" in capsys.readouterr().err
    write_steps(tmp_path, 3, (4,))
    assert steps_of(tmp_path) == [2, 3, 4]
    assert not capsys.readouterr().err.count("damaged") > 1


def test_kinds_are_read_apart_and_a_missing_file_has_none(tmp_path):
    w = writer(tmp_path)
    w.write(1, {"loss": 2.0})
    w.write(1, {"average": {}}, kind="evaluation")
    w.close()
    path = tmp_path / "metrics.jsonl"
    assert metrics.read_metrics(path) == [{"step": 1, "kind": "train", "loss": 2.0}]
    assert [v["average"] for v in metrics.read_metrics(path, kind="evaluation")] == [{}]
    assert metrics.read_metrics(tmp_path / "none.jsonl") == []


def test_lines_are_on_disk_before_close(tmp_path):
    w = writer(tmp_path)
    w.write(1, {"loss": 2.0})
    assert steps_of(tmp_path) == [1]
    w.close()


def test_an_inactive_writer_writes_nothing(tmp_path):
    write_steps(tmp_path, 0, (1, 2), active=False, trackers=("tensorboard",))
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_scalars(tmp_path):
    write_steps(tmp_path, 0, (1, 2), trackers=("tensorboard",))
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()


def test_a_full_disk_ends_tensorboard_and_not_the_run(tmp_path, monkeypatch, caplog):
    from tensorboardX.record_writer import RecordWriter

    original, left = RecordWriter.write, [3]

    def write(self, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    write_steps(tmp_path, 0, range(1, 30), trackers=("tensorboard",))
    assert "the tracker tensorboard failed and is left out" in caplog.text


@pytest.mark.parametrize("broken", ["__init__", "write_event", "close"])
def test_a_failure_of_tensorboard_stops_nothing(broken, tmp_path, monkeypatch, caplog):
    from tensorboardX import event_file_writer

    calls = []

    def fail(*_, **__):
        calls.append(broken)
        raise OSError("disk full")

    monkeypatch.setattr(event_file_writer.EventsWriter, broken, fail)
    write_steps(tmp_path, 0, (1, 2), trackers=("tensorboard",))
    assert steps_of(tmp_path) == [1, 2]
    assert calls == [broken]
    assert len(caplog.records) == 1
    assert "disk full" in caplog.text


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_module_like_wandb_gets_the_numbers_and_is_continued(name, tmp_path, monkeypatch):
    calls = []
    module = types.ModuleType(name)
    module.init = lambda **options: calls.append(("init", options))
    module.log = lambda values, step: calls.append(("log", step, values))
    module.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "pans")
    write_steps(tmp_path, 0, (1, 2), trackers=(name,))
    write_steps(tmp_path, 2, (3,), trackers=(name,))
    first, again = (call[1] for call in calls if call[0] == "init")
    assert first == again
    assert first["project"] == "pans"
    assert first["name"].startswith("base-")
    assert first["resume"] == "allow"
    assert first["config"]["log"]["trackers"] == (name,)
    assert first.get("id", first["name"]) == first["name"]
    assert calls[1:4] == [
        ("log", 1, {"train/loss": 1.0}),
        ("log", 2, {"train/loss": 2.0}),
        ("finish",),
    ]


class Memory:
    """From outside: a tracker that remembers, and fails at step 3."""

    lines: list = []  # noqa: RUF012

    def __init__(self, cfg, *, workdir, start_step):
        self.lines.append((cfg.name, workdir.name, start_step))

    def log(self, step, values, kind):
        if step == 3:
            raise OSError("full")
        self.lines.append((step, dict(values), kind))

    def close(self):
        self.lines.append("closed")


def test_a_tracker_from_outside(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Memory, "lines", [])
    names = (f"{__name__}:Memory", "tensorboard")
    w = writer(tmp_path, 1, trackers=names)
    w.write(2, {"average": {"a": 1}, "specialists": 0.5}, kind="evaluation")
    w.write(2, {"average": {}}, kind="evaluation")  # no numbers
    w.close()
    start = ("base", tmp_path.name, 1)
    assert Memory.lines == [start, (2, {"specialists": 0.5}, "evaluation"), "closed"]
    write_steps(tmp_path, 2, (3, 4, 5), trackers=names)
    assert len(Memory.lines) == 4
    assert [r.message for r in caplog.records] == [
        f"the tracker {names[0]} failed and is left out from here: full"
    ]
    assert steps_of(tmp_path) == [3, 4, 5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", r"unknown tracker 'tensorbord' \(did you mean tensorboard\?\)"),
        ("nowhere:make", "there is no module nowhere"),
        ("wandb", "log.trackers names wandb, which is not installed: pip install wandb"),
    ],
)
def test_a_tracker_that_does_not_exist_is_refused_before_work_starts(name, message, monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # whatever is installed here
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=message):
        trackers.find((name,))
