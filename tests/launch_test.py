"""The shell scripts parse, and their dry run names the commands they stand for."""

import os
import pathlib
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"])


def dry_run(tmp_path: pathlib.Path, script: str, *arguments: str, **env: str) -> list[list[str]]:
    """The commands that a script would run, from some other folder."""
    env = {**os.environ, "DRY_RUN": "1", "PYTHON": sys.executable, **env}
    done = subprocess.run(
        ["bash", str(ROOT / script), *arguments],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(x[2:]) for x in done.stdout.splitlines() if x.startswith("+ ")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_stop_at_errors(script: pathlib.Path):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "\nset -euo pipefail\n" in script.read_text("utf-8")


def test_test_script_lints_and_passes_arguments_on(tmp_path):
    commands = dry_run(tmp_path, "launch/test.sh", "--all", "-k", "a or b")
    tails = [[pathlib.Path(c[0]).name, *c[1:]] for c in commands]
    assert ["ruff", "check", "--extend-exclude", ".venv-*", "."] in tails
    assert ["ruff", "format", "--check", "--extend-exclude", ".venv-*", "."] in tails
    assert tails[-1] == ["python", "-m", "pytest", "--run-slow", "-k", "a or b"]
    assert dry_run(tmp_path, "launch/test.sh")[-1][1:] == ["-m", "pytest"]


@pytest.mark.parametrize("script", ["launch/test.sh", "launch/quickstart.sh"])
def test_scripts_refuse_an_old_python(tmp_path, script):
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError) as error:
        dry_run(tmp_path, script, PYTHON=str(old), VENV=str(tmp_path / "venv"))
    assert error.value.returncode == 2
    assert "needs Python 3.11 or newer" in error.value.stderr


@pytest.mark.parametrize(
    ("arguments", "configs", "folder"),
    [
        ([], ("experiments/quickstart.py", "experiments/quickstart.py:generic"), "runs/quickstart"),
        (
            ["--fast"],
            ("experiments/quickstart.py:fast", "experiments/quickstart.py:fast_generic"),
            "runs/quickstart-fast",
        ),
    ],
)
def test_quickstart_runs_the_stages_in_order(tmp_path, arguments, configs, folder):
    commands = dry_run(tmp_path, "launch/quickstart.sh", *arguments, VENV=str(tmp_path / "venv"))
    own = [c[1:] for c in commands if c[0].endswith("/soup-jax")]
    names = ["prepare", "train", "train", "evaluate", "instantiate", "generate"]
    assert [c[0] for c in own] == names
    assert [c[1] for c in own[:3]] == [f"--config={c}" for c in (configs[0], *configs)]
    assert f"--workdir={folder}/soup" in own[1]
    assert f"--workdir={folder}/generic" in own[2]
    assert f"--specialists={folder}/text/specialists/*.jsonl" in own[3]
    assert f"--model={folder}/specialist" in own[5]
    assert f"--config.corpus.sources={folder}/text/generic" in own[0]
    collect = next(c for c in commands if "launch/collect_text.py" in c)
    assert collect[-2:] == ["--out", f"{folder}/text"]


def test_quickstart_uses_an_environment_that_has_the_package(tmp_path):
    command = tmp_path / "venv" / "bin" / "soup-jax"
    command.parent.mkdir(parents=True)
    command.touch(mode=0o755)
    commands = dry_run(tmp_path, "launch/quickstart.sh", VENV=str(tmp_path / "venv"))
    assert not any("pip" in c for c in commands)
    assert commands[1][0] == str(command)


def test_quickstart_refuses_unknown_arguments(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as error:
        dry_run(tmp_path, "launch/quickstart.sh", "--quick")
    assert error.value.returncode == 2
