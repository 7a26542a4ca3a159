"""The console command: exit statuses, one-line errors, help, and the whole chain once."""

import errno
import json
import logging
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import tiny_config

from soup_jax.cli import __main__, config_flag, main
from soup_jax.config import schema as config_lib
from soup_jax.specialists import compare
from soup_jax.training import learning_curve, loop

CONFIG = "--config=experiments/quickstart.py"


def _error(capsys, arguments: list[str]) -> str:
    assert main.run(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("soup-jax: error: ")
    return lines[0]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run outside the repository; the command's logging does not outlive the test."""
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("soup_jax")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


def test_unknown_subcommand_lists_the_known(capsys):
    line = _error(capsys, ["tarin"])
    assert all(name in line for name in ("'tarin'", *main.SUBCOMMANDS))


def test_nothing_at_all_prints_the_usage(capsys):
    assert main.run([]) == 2
    assert "soup-jax SUBCOMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", *main.SUBCOMMANDS])
def test_help(name, capsys):
    assert main.run([*([name] if name else []), "--help"]) == 0
    captured = capsys.readouterr()
    assert "soup-jax SUBCOMMAND" in captured.out
    assert captured.err == ""
    flag = {"train": "--workdir", "prepare": "--config", "evaluate": "--against"}
    flag |= {"instantiate": "--documents", "generate": "--temperature"}
    assert flag.get(name, "") in captured.out


@pytest.mark.parametrize("name", [*main.SUBCOMMANDS])
def test_unknown_flag(name, capsys):
    assert "nosuchflag" in _error(capsys, [name, "--nosuchflag=1"])


@pytest.mark.parametrize("name", [*main.SUBCOMMANDS])
def test_positional_rubbish(name, capsys):
    config = [CONFIG] if name in ("prepare", "train") else []
    config += ["--corpus=corpus"] if name == "histogram" else []
    assert "rubbish" in _error(capsys, [name, *config, "rubbish"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepare"], ["--config=FILE.py is required"]),
        (["train"], ["--config=FILE.py is required"]),
        (["train", CONFIG], ["--workdir=DIR is required"]),
        (["prepare", "--config=nowhere.py"], ["nowhere.py", "experiments/quickstart.py"]),
        (["train", CONFIG, "--config.num_expert=3"], ["num_expert", "num_experts"]),
        (["train", CONFIG, "--config.model.dmi=3"], ["dmi"]),
        (["train", CONFIG, "--config.num_steps=many"], ["num_steps", "base 10: 'many'"]),
        (["train", CONFIG, "--config.model=3"], ["model"]),
        (["train", CONFIG, "--config.num_mixtures=0", "--workdir=r"], ["num_mixtures"]),
        (["train", CONFIG, "--config.corpus.dir=gone", "--workdir=r"], ["gone", "prepare"]),
        (["plan", CONFIG, "--chip=H200", f"--config.seed={1 << 63}"], ["must be below 2^32"]),
        (["evaluate"], ["--workdir=RUN is required"]),
        (["evaluate", "--workdir=gone"], ["gone is not a run"]),
        (["evaluate", "--workdir=gone", "--step=last"], ["step", "last"]),
        (["instantiate"], ["--run is required"]),
        (["instantiate", "--run=r"], ["--documents is required"]),
        (["instantiate", "--run=r", "--documents=d"], ["--out is required"]),
        (["instantiate", "--run=gone", "--documents=d", "--out=o"], ["gone is not a run"]),
        (["generate"], ["--model=DIR is required"]),
        (["generate", "--model=gone"], ["gone/recipe.json does not exist"]),
        (["generate", "--model=m", "--max_tokens=0"], ["max_tokens"]),
        (["generate", "--model=m", "--temperature=-1"], ["temperature"]),
    ],
)
def test_mistake_is_one_line(arguments, words, capsys, tmp_path):
    line = _error(capsys, arguments)
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []  # refused before anything is written


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 2, "x: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "x"), 2, "x: the file system is read-only"),
        (OSError(errno.EFBIG, "File too large", "x"), 2, "x: the file may not grow further"),
        (MemoryError(), 2, "the machine is out of memory"),
    ],
)
def test_what_stops_a_command_is_one_line(error, status, says, monkeypatch, capsys):
    def run(values):
        raise error

    monkeypatch.setattr(main.SUBCOMMANDS["verify"], "run", run)
    assert main.run(["verify", "x"]) == status
    assert capsys.readouterr().err.startswith(f"soup-jax: error: {says}")


INTERRUPTED = """
import gc, signal, sys, time
from soup_jax.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

def interrupt(phase, _):
    if phase == "stop":
        gc.callbacks.remove(interrupt)
        raise KeyboardInterrupt

def run(values):
    gc.callbacks.append(interrupt)
    gc.collect()
    time.sleep(60)
    return 0

main.SUBCOMMANDS["verify"].run = run
sys.exit(main.run(["verify", "x"]))
"""


def test_an_interrupt_amid_garbage_collection_is_not_lost():
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (130, "soup-jax: error: interrupted\n")


def test_an_interrupt_while_the_command_is_imported_is_one_line(monkeypatch, capsys):
    class Importing:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "soup_jax.cli.main", Importing())
    with pytest.raises(SystemExit) as e:
        __main__.main()
    assert (e.value.code, capsys.readouterr().err) == (130, "soup-jax: error: interrupted\n")


@pytest.mark.parametrize("arguments", [["help"], ["verify", "--help"]])
def test_a_closed_pipe_ends_a_command_in_silence(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "soup_jax.cli", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_error_of_a_config_file_is_its_last_sentence(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    raise ValueError('no such preset')\n")
    assert "no such preset" in _error(capsys, ["prepare", "--config=mine.py"])


def test_replaced_section_is_refused(capsys, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from soup_jax.experiments import base\n"
        "def get_config():\n"
        "    cfg = base.get_config()\n"
        "    with cfg.unlocked():\n"
        "        cfg.router = {'scale': 2.0}\n"
        "    return cfg\n"
    )
    line = _error(capsys, ["prepare", "--config=mine.py"])
    assert "missing fields router." in line
    assert "replaced as a whole" in line


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(values):
        raise KeyError("a bug")

    monkeypatch.setattr(main.SUBCOMMANDS["generate"], "run", broken)
    with pytest.raises(KeyError, match="a bug"):
        main.run(["generate", "--model=m"])


def test_shipped_config_is_found_from_anywhere_and_a_local_one_wins(tmp_path):
    argument = "--config=experiments/quickstart.py"
    found = pathlib.Path(config_flag.resolve([argument])[0].partition("=")[2])
    assert found.is_absolute()
    assert found.read_text().count("def get_config") == 1
    assert config_flag.resolve(["--workdir=r"]) == ["--workdir=r"]
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "quickstart.py").write_text("get_config = None")
    assert config_flag.resolve([argument]) == [argument]


def test_whole_chain(tiny_text, tmp_path, capsys):
    flat = dict(config_lib.flat_items(tiny_config()))
    flat |= {
        "corpus.dir": str(tmp_path / "corpus"),
        "corpus.sources": (str(tiny_text / "generic.jsonl"),),
    }
    (tmp_path / "tiny.py").write_text(
        "from soup_jax.experiments import base\n"
        "def get_config():\n"
        "    cfg = base.get_config()\n"
        f"    cfg.update_from_flattened_dict({flat!r})\n"
        "    return cfg\n"
    )
    run, model, documents = tmp_path / "run", tmp_path / "model", str(tiny_text / "python.jsonl")
    config = "--config=tiny.py"
    assert main.run(["prepare", config]) == 0
    assert (tmp_path / "corpus" / "manifest.json").exists()

    assert main.run(["train", config, f"--workdir={run}", "--config.num_steps=6"]) == 0
    assert "trained: " in capsys.readouterr().out
    assert config_lib.load(run / "config.json").num_steps == 6
    assert (run / "learning_curve.png").exists()
    assert (run / "checkpoints" / "6").is_dir()

    words = ["evaluate", f"--workdir={run}", f"--specialists={documents}", "--max_windows=2"]
    assert main.run([*words, "--text=printed.txt"]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "printed.txt").read_text() == printed
    result = json.loads((run / "evaluation.json").read_text())
    assert f"{result['average']['specialist']['loss']:.4f}" in printed
    assert str(run / "evaluation.json") in printed

    words = ["instantiate", f"--run={run}", f"--documents={documents}", f"--out={model}"]
    assert main.run(words) == 0
    assert "30 documents" in capsys.readouterr().out
    recipe = json.loads((model / "recipe.json").read_text())
    np.testing.assert_allclose(sum(recipe["h"]), 1)
    assert recipe["step"] == 6

    words = ["generate", f"--model={model}", "--prompt=def class", "--max_tokens=5"]
    assert main.run(words) == 0
    first = capsys.readouterr().out
    assert first.startswith("def class")
    assert len(first) > len("def class\n")
    assert main.run(words) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "no/such/file.py"], "no config file 'no/such/file.py'"),
        (["--config.num_steps=3"], "--config=FILE.py is required"),
    ],
)
def test_config_as_two_words_and_overrides_without_a_config(arguments, message, capsys):
    assert main.run(["train", *arguments, "--workdir=unused"]) == 2
    assert message in capsys.readouterr().err


def _evaluated(loss: float) -> dict:
    """A result of `evaluate` in which one specialist has this loss."""

    def row(*losses: float) -> dict:
        columns = ("specialist", "generic_h")
        return {c: {"loss": x, "bits_per_byte": x} for c, x in zip(columns, losses)}

    return {
        "specialists": {"law": row(loss, 2.5), "code": row(1.5, 2.0)},
        "average": row((loss + 1.5) / 2, 2.25),
        "generic_validation": {"generic_h": {"loss": 3.0, "bits_per_byte": 1.0}},
    }


@pytest.mark.parametrize(("loss", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_is_shown_and_ends_with_status_1(
    loss, shown, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(compare, "evaluate_runs", lambda *args, **kwargs: _evaluated(loss))
    monkeypatch.setattr(learning_curve, "draw", lambda *args, **kwargs: "picture")
    assert main.run(["evaluate", "--workdir=.", "--json=n.json", "--text=t.txt"]) == 1
    out, err = capsys.readouterr()
    lines = {line[:10].strip(): line[20:].split() for line in out.splitlines()}
    assert lines["law"] == [shown, "2.5000*"]
    assert lines["code"] == ["1.5000*", "2.0000"]
    assert lines["average"] == [shown, "2.2500*"]
    assert "no averages to compare" in out
    assert (tmp_path / "t.txt").read_text() == out
    assert err.startswith("soup-jax: error: the loss is not finite for specialist of law (1 in all")
    assert err.count("\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    numbers = json.loads((tmp_path / "n.json").read_text(), parse_constant=refuse)
    assert numbers["specialists"]["law"]["specialist"]["loss"] is None
    assert numbers["specialists"]["code"] == _evaluated(loss)["specialists"]["code"]


def test_each_part_has_a_file_of_its_own(monkeypatch, tmp_path, capsys):
    losses = {"final": 1.0, "tuning": 2.0}
    monkeypatch.setattr(compare, "evaluate_runs", lambda *_, part, **__: _evaluated(losses[part]))
    monkeypatch.setattr(learning_curve, "draw", lambda *args, **kwargs: "picture")
    assert main.run(["evaluate", "--workdir=."]) == 0
    assert main.run(["evaluate", "--workdir=.", "--part=tuning"]) == 0
    assert "numbers: evaluation_tuning.json" in capsys.readouterr().out
    for name, part in (("evaluation", "final"), ("evaluation_tuning", "tuning")):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["specialists"]["law"]["specialist"]["loss"] == losses[part]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'matplotlib'"), "matplotlib"),
        (OSError(errno.EROFS, "Read-only file system", "learning_curve.png"), "learning_curve.png"),
        (RuntimeError("broken backend"), "RuntimeError: broken backend"),
    ],
)
def test_a_picture_that_fails_fails_no_command(error, reason, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(learning_curve, "draw", fail)
    monkeypatch.setattr(loop, "train", lambda *args, **kwargs: None)
    monkeypatch.setattr(compare, "evaluate_runs", lambda *args, **kwargs: _evaluated(1.0))
    assert main.run(["train", CONFIG, "--workdir=w"]) == 0
    assert main.run(["evaluate", "--workdir=.", "--json=n.json"]) == 0
    out, err = capsys.readouterr()
    assert [reason in text for text in out.split("not drawn: ")] == [False, True, True]
    assert err == ""


def test_what_a_library_logs_of_a_full_disk_is_told_once(caplog):
    main._set_up_logging()
    logger = logging.getLogger("absl")
    for error in (OSError(28, "No space left on device"), ValueError("a bug")):
        try:
            raise error
        except Exception:
            logger.exception("a thread failed")
    assert "a bug" in caplog.text
    assert "No space" not in caplog.text


def test_a_command_that_failed_does_not_wait_for_what_is_left_of_a_save():
    # Tensorstore goes on for a quarter of an hour at a bucket that does not answer.
    program = """
import threading, time
from soup_jax.cli import __main__ as entry, main
class Saving(threading.Thread):
    __module__ = "orbax.checkpoint.futures"
def run(argv):
    Saving(target=time.sleep, args=(300,)).start()
    print("told")
    return 2
main.run = run
entry.main()
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "told\n"), done.stderr
