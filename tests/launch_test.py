"""The launchers parse, and run, with everything outside them replaced, what they stand for.

No cluster is at hand: `srun`, `scontrol`, `gcloud` and `soup-jax` are small scripts that write down
how they were called. What Slurm, Kubernetes and Google Cloud make of it is not tested.
"""

import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from absl import flags

from soup_jax.cli import main
from soup_jax.experiments import base

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"])
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))
# A config and flags that come through whole only if every step of the way quotes them.
CONFIG, WORKDIR = "my configs/soup.py:110m", "my runs/a$HOME"
FLAGS = ['--config.name=it\'s a "run" * 2', "--config.corpus.sources=('a b','c')"]
# Of the start-up over several processes, for as long as `soup-jax train` does not define them.
CLUSTER_FLAGS = {"distributed", "coordinator", "num_processes", "process_id"}


def outside() -> dict[str, str]:
    """The environment, without what would tell a launcher of a cluster or of devices."""
    settings = ("SLURM_", "SOUP_JAX_", "CUDA_", "XLA_FLAGS", "JAX_PLATFORMS", "VENV", "DRY_RUN")
    return {k: v for k, v in os.environ.items() if not k.startswith(settings)}


def commands_in(output: str) -> list[list[str]]:
    """The commands that a launcher said it runs."""
    return [shlex.split(x[2:]) for x in output.splitlines() if x.startswith("+ ")]


def run_script(
    script: str, *arguments: str, cwd: pathlib.Path = ROOT, check: bool = True, **env: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / script), *arguments],
        cwd=cwd,
        env={**outside(), **env},
        capture_output=True,
        text=True,
        check=check,
    )


def dry_run(tmp_path: pathlib.Path, script: str, *arguments: str, **env: str) -> list[list[str]]:
    """The commands that a script would run, from some other folder."""
    env = {"DRY_RUN": "1", "PYTHON": sys.executable, **env}
    return commands_in(run_script(script, *arguments, cwd=tmp_path, **env).stdout)


def stub(path: pathlib.Path, body: str) -> None:
    """An executable Python script; its `log(...)` adds a line of JSON to calls.jsonl beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, os, pathlib, signal, subprocess, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "def log(*what):\n"
        "    with open(here / 'calls.jsonl', 'a') as f:\n"
        "        f.write(json.dumps(what) + '\\n')\n" + body
    )
    path.chmod(0o755)


def calls(folder: pathlib.Path) -> list[list]:
    path = folder / "calls.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def wait_for(path: pathlib.Path, process: subprocess.Popen) -> None:
    """Until `path` exists; fails if the process, which shall make it, ends before."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def make_run(workdir: pathlib.Path, *, num_steps: int, saved: int) -> None:
    """What a launcher looks at in the folder of a run."""
    (workdir / "checkpoints" / str(saved)).mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({"num_steps": num_steps}))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_stop_at_errors(script: pathlib.Path):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "\nset -euo pipefail\n" in script.read_text("utf-8")


PYTEST = ["python", "-m", "pytest", "-n", "3", "--dist=loadfile", "--no-loadscope-reorder"]


def script_commands(tmp_path: pathlib.Path, *arguments: str, **env: str) -> list[list[str]]:
    """What launch/test.sh would run, by the names of the programs."""
    env = {"WORKERS": "3", **env}
    commands = dry_run(tmp_path, "launch/test.sh", *arguments, **env)
    return [[pathlib.Path(c[0]).name, *c[1:]] for c in commands]


def test_test_script_lints_and_passes_arguments_on(tmp_path):
    commands = script_commands(tmp_path, "--all", "-k", "a or b")
    assert ["ruff", "check", "--extend-exclude", ".venv-*", "."] in commands
    assert ["ruff", "format", "--check", "--extend-exclude", ".venv-*", "."] in commands
    assert ["mypy"] in commands
    assert commands[-1] == [*PYTEST, "--run-slow", "-k", "a or b"]
    assert script_commands(tmp_path, "--fast")[-1] == [*PYTEST, "--fast"]
    workers = dry_run(tmp_path, "launch/test.sh")[-1][4]
    assert workers == str(min(4, os.cpu_count()))


def test_test_script_runs_the_fast_tests_with_other_releases(tmp_path):
    newer = tmp_path / "python3.12"
    newer.write_text("#!/bin/sh\nexit 0\n")  # is whatever it is asked to be
    newer.chmod(0o755)
    commands = script_commands(tmp_path, PYTHON312=str(newer))
    if sys.version_info < (3, 12):
        assert [c for c in commands if "pytest" in c] == [PYTEST, [*PYTEST, "--fast"]]
    done = run_script(
        "launch/test.sh", DRY_RUN="1", PYTHON=sys.executable, PYTHON312=str(tmp_path / "none")
    )
    assert sys.version_info >= (3, 12) or "newest jax are skipped" in done.stdout
    lowest = script_commands(tmp_path, "--lowest", "-x")
    assert [c for c in lowest if "pytest" in c] == [[*PYTEST, "--fast", "-x"]]
    hf = script_commands(tmp_path, "--hf", "-x")
    files = [f"tests/{name}_test.py" for name in ("hf", "gguf", "lm_eval", "minilm")]
    assert [c for c in hf if "pytest" in c] == [[*PYTEST, *files, "-x"]]
    servers = script_commands(tmp_path, "--servers")
    files = [f"tests/{name}_test.py" for name in ("parts", "object_storage")]
    assert [c for c in servers if "pytest" in c] == [[*PYTEST, *files]]
    assert not any(c[0] == "ruff" for c in [*lowest, *hf])


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


# ------------------------------------------------------------------------------ the same arguments


def cluster_commands(tmp_path: pathlib.Path) -> dict[str, list[list[str]]]:
    """What each launcher runs for the same arguments, from `soup-jax` on."""
    given = (CONFIG, WORKDIR, *FLAGS)
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "64"}
    lines = {
        "local": dry_run(tmp_path, "launch/local.sh", *given),
        "local4": dry_run(tmp_path, "launch/local.sh", *given, PROCESSES="4", CPU_DEVICES="2"),
        "slurm": dry_run(ROOT, "launch/slurm.sbatch", *given, **slurm),
        "tpu_vm": [],
    }
    out = run_script("launch/tpu_vm.sh", *given, TPU="t", ZONE="z", DRY_RUN="1").stdout
    plain = [x for x in out.splitlines() if x.startswith("on every host: ")]
    lines["tpu_vm"] = [shlex.split(x.partition(": ")[2]) for x in plain]
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "pod.py"), *given],
        env={**outside(), "DRY_RUN": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines["pod"] = commands_in(done.stdout)

    def program(command: list[str]) -> list[str]:
        start = next(i for i, c in enumerate(command) if pathlib.Path(c).name == "soup-jax")
        return command[start + 1 :]

    return {name: [program(c) for c in found] for name, found in lines.items()}


def test_every_launcher_takes_the_same_arguments_and_quotes_them(tmp_path):
    found = cluster_commands(tmp_path)
    assert {name: len(c) for name, c in found.items()} == {
        "local": 1,
        "local4": 4,
        "slurm": 1,
        "tpu_vm": 1,
        "pod": 1,
    }
    for name, commands in found.items():
        for command in commands:
            start = ["train", f"--config={CONFIG}", f"--workdir={WORKDIR}"]
            assert command[:3] == start, name
            assert command[-2:] == FLAGS, name  # last, so that they win


def test_launchers_use_flags_and_fields_that_exist(tmp_path):
    values = flags.FlagValues()
    main.SUBCOMMANDS["train"].define(values, ["soup-jax train"])
    known = set(values) if "distributed" in values else set(values) | CLUSTER_FLAGS
    cfg = base.get_config()
    commands = [c[1:] for found in cluster_commands(tmp_path).values() for c in found]
    commands += [container(m)["args"][2:] for m in MANIFESTS]
    seen = set()
    for argument in (a for c in commands for a in c):
        name, _, value = argument.removeprefix("--").partition("=")
        seen.add(name)
        if not name.startswith("config."):
            assert name in known, argument
            continue
        *sections, field = name.split(".")[1:]
        part = cfg
        for section in sections:
            part = part[section]
        assert field in part, argument
        if isinstance(part[field], int):
            int(value)
    assert {"config.mesh.platform", "config.mesh.num_devices", "distributed"} <= seen


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch", "tpu_vm.sh"])
@pytest.mark.parametrize("arguments", [[], ["experiments/soup_110m.py"]])
def test_launchers_say_how_they_are_called(script, arguments):
    env = {"TPU": "t", "ZONE": "z", "SLURM_JOB_NUM_NODES": "1", "DRY_RUN": "1"}
    done = run_script(f"launch/{script}", *arguments, check=False, **env)
    assert done.returncode == 2
    assert "usage: " in done.stderr
    assert "CONFIG WORKDIR" in done.stderr


def test_launchers_set_variables_that_are_read(tmp_path):
    local = dry_run(tmp_path, "launch/local.sh", "c", "w", PROCESSES="2")
    names = {n for c in local for n in settings_of(c)}
    names |= {e["name"] for m in MANIFESTS for e in container(m)["env"]}
    names = {n for n in names if n.startswith("SOUP_JAX_")}
    flag_names = CLUSTER_FLAGS - {"distributed"}
    assert names == {f"SOUP_JAX_{n.upper()}" for n in flag_names} | {"SOUP_JAX_SECRET"}
    values = flags.FlagValues()
    main.SUBCOMMANDS["train"].define(values, ["soup-jax train"])
    if "distributed" in values:
        sources = "".join(p.read_text("utf-8") for p in (ROOT / "soup_jax").rglob("*.py"))
        assert not [n for n in names if n not in sources]


# ---------------------------------------------------------------------------------------- local.sh


def environment(tmp_path: pathlib.Path, program: str) -> pathlib.Path:
    """A virtual environment with a stand-in for `soup-jax`."""
    stub(tmp_path / "venv" / "bin" / "soup-jax", program)
    # Not a link: that would look for its libraries from where the link is.
    shell = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n'
    (tmp_path / "venv" / "bin" / "python3").write_text(shell)
    (tmp_path / "venv" / "bin" / "python3").chmod(0o755)
    return tmp_path / "venv"


def settings_of(command: list[str]) -> dict[str, str]:
    """The variables of `env A=B ... program`."""
    assert command[0] == "env"
    end = next(i for i, c in enumerate(command) if c.endswith("soup-jax"))
    return dict(c.split("=", 1) for c in command[1:end])


def test_local_is_one_process_outside_any_cluster(tmp_path):
    (command,) = dry_run(tmp_path, "launch/local.sh", "c.py", "w", VENV="/some/venv")
    assert command[1:] == [
        "/some/venv/bin/soup-jax",
        "train",
        "--config=c.py",
        "--workdir=w",
        "--distributed=off",
    ]


@pytest.mark.parametrize("script", ["local.sh", "quickstart.sh"])
def test_a_cpu_keeps_freed_memory_unless_told_otherwise(script):
    text = (ROOT / "launch" / script).read_text("utf-8")
    block = text[text.index("if ! compgen -e MALLOC_") : text.index("\nfi >/dev/null")]
    block = re.sub(r"&&\s+! compgen -G [^\s;]+", "", block)
    program = block + "\nfi >/dev/null\nenv"  # as on a machine without an accelerator

    def settings(**env):
        command = ["bash", "-euc", program]
        lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        return [line for line in lines.splitlines() if line.startswith("MALLOC_")]

    path = os.environ["PATH"]
    assert len(settings(PATH=path)) == 4
    assert settings(PATH=path, MALLOC_TOP_PAD_="1") == ["MALLOC_TOP_PAD_=1"]


def test_local_deals_out_gpus_and_names_the_processes(tmp_path):
    commands = dry_run(
        tmp_path, "launch/local.sh", "c.py", "w", PROCESSES="2", CUDA_VISIBLE_DEVICES="1,3,4,6"
    )
    found = [settings_of(c) for c in commands]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in found] == ["1,3", "4,6"]
    assert [s["SOUP_JAX_PROCESS_ID"] for s in found] == ["0", "1"]
    assert {s["SOUP_JAX_NUM_PROCESSES"] for s in found} == {"2"}
    (coordinator,) = {s["SOUP_JAX_COORDINATOR"] for s in found}
    assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d{3,4}", coordinator)
    assert all(not any("distributed" in a for a in c) for c in commands)


def test_local_gives_all_processes_one_secret_and_shows_it_nowhere(tmp_path):
    venv = environment(tmp_path, "log(os.environ.get('SOUP_JAX_SECRET'))")
    secrets = []
    for given in ({}, {}, {"SOUP_JAX_SECRET": "mine" * 8}):
        (venv / "bin" / "calls.jsonl").unlink(missing_ok=True)
        env = {"VENV": str(venv), "PROCESSES": "3", "PORT": "1", **given}
        done = run_script("launch/local.sh", "c", "w", **env)
        first, *others = (c[0] for c in calls(venv / "bin"))
        assert others == [first] * 2
        assert first not in done.stdout + done.stderr
        secrets.append(first)
    assert re.fullmatch("[0-9a-f]{64}", secrets[0])
    assert len(set(secrets)) == 3
    assert secrets[2] == "mine" * 8


def test_local_simulates_cpu_devices_and_keeps_other_xla_flags(tmp_path):
    env = {"PROCESSES": "2", "CPU_DEVICES": "3", "XLA_FLAGS": "--xla_a=1", "PORT": "4321"}
    for command in dry_run(tmp_path, "launch/local.sh", "c.py", "w", **env):
        found = settings_of(command)
        assert found["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=3"
        assert found["JAX_PLATFORMS"] == "cpu"
        assert found["SOUP_JAX_COORDINATOR"] == "127.0.0.1:4321"
        assert "CUDA_VISIBLE_DEVICES" not in found


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"PROCESSES": "3", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "4 GPUs cannot be shared evenly"),
        ({"PROCESSES": "0"}, "not a number from 1 on"),
        ({"PROCESSES": "two"}, "not a number from 1 on"),
    ],
)
def test_local_refuses_what_does_not_fit(env, message):
    done = run_script("launch/local.sh", "c.py", "w", check=False, DRY_RUN="1", **env)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("processes", ["1", "3"])
def test_local_ends_with_the_status_of_the_worst_process(tmp_path, processes):
    venv = environment(tmp_path, "sys.exit(7 * (os.environ.get('SOUP_JAX_PROCESS_ID') != '2'))")
    done = run_script(
        "launch/local.sh", "c", "w", check=False, VENV=str(venv), PROCESSES=processes, PORT="1"
    )
    assert done.returncode == 7
    assert done.stderr.count("ended with status 7") == (2 if processes == "3" else 0)


@pytest.mark.parametrize("processes", [1, 3])
def test_local_passes_sigterm_on_and_waits_for_the_save(tmp_path, processes):
    program = """
name = os.environ.get("SOUP_JAX_PROCESS_ID", "0")
received = []
signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
(here / f"ready{name}").touch()
for _ in range(1500):  # not for ever: a signal that is lost shall fail the test, not hang it
    if received:
        break
    time.sleep(0.02)
else:
    sys.exit(99)
time.sleep(0.2)  # saving
log("saved", name)
"""
    venv = environment(tmp_path, program)
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), "c", "w"],
        env={**outside(), "VENV": str(venv), "PROCESSES": str(processes), "PORT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for i in range(processes):
        wait_for(venv / "bin" / f"ready{i}", process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 0
    saved = sorted(name for _, name in calls(venv / "bin"))
    assert saved == [str(i) for i in range(processes)]


# ------------------------------------------------------------------------------------ slurm.sbatch


def directives() -> dict[str, str]:
    """The #SBATCH lines, and that Slurm reads them all: it stops at the first command."""
    lines = (LAUNCH / "slurm.sbatch").read_text("utf-8").splitlines()
    end = next(i for i, x in enumerate(lines) if x and not x.startswith("#"))
    found = [x.removeprefix("#SBATCH ") for x in lines[:end] if x.startswith("#SBATCH ")]
    assert sum("#SBATCH --" in x for x in lines) == len(found)
    return dict(x.removeprefix("--").partition("=")[::2] for x in found)


def test_slurm_directives():
    found = directives()
    assert "requeue" in found
    assert found["open-mode"] == "append"  # or each restart would wipe the log
    name, seconds = found["signal"].split("@")
    assert name == "TERM"  # "B:TERM" would go to the script, which cannot pass it on
    assert 60 < int(seconds) <= 65535  # Slurm may send it a minute early; the limit is its own
    hours, minutes, _ = map(int, found["time"].split(":"))
    assert int(seconds) < 3600 * hours + 60 * minutes
    assert {"nodes", "gpus-per-node", "exclusive"} <= found.keys()


@pytest.fixture
def slurm(tmp_path: pathlib.Path):
    """Runs the batch script in a job of two nodes with four GPUs; gives (its end, calls made)."""
    bin_ = tmp_path / "bin"
    stub(
        bin_ / "srun",
        """
log("srun", sys.argv[1:], os.environ.get("JAX_LOCAL_DEVICE_IDS"))
(here / "secret").write_text(os.environ["SOUP_JAX_SECRET"])
sys.exit(int(os.environ["STUB_STATUS"]))
""",
    )
    stub(
        bin_ / "scontrol",
        """
log("scontrol", sys.argv[1:])
if "show" in sys.argv:
    print("JobId=7 JobName=soup_jax JobState=%s Reason=None" % os.environ["STUB_STATE"])
""",
    )
    workdir = tmp_path / "run"

    def start(status: int = 0, *flags: str, state: str = "RUNNING", **env: str):
        job = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "gpu[01-02]",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_CPUS_ON_NODE": "50",
            "STUB_STATUS": str(status),
            "STUB_STATE": state,
            "VENV": str(environment(tmp_path, "")),
            "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
        }
        done = run_script(
            "launch/slurm.sbatch", "c.py", str(workdir), *flags, check=False, **(job | env)
        )
        return done, calls(bin_)

    start.workdir = workdir
    return start


@pytest.mark.parametrize(
    ("per", "tasks", "per_node", "cores", "devices"),
    [("gpu", 8, 4, 12, None), ("node", 2, 1, 50, "0,1,2,3")],
)
def test_slurm_starts_a_process_per_gpu_or_per_node(slurm, per, tasks, per_node, cores, devices):
    make_run(slurm.workdir, num_steps=5, saved=5)
    done, made = slurm(0, "--config.seed=1", PROCESS_PER=per)
    assert done.returncode == 0, done.stderr
    ((name, arguments, local_ids),) = made
    assert name == "srun"
    options = dict(a.partition("=")[::2] for a in arguments if not a.startswith("--config."))
    assert options["--nodes"] == "2"
    assert options["--ntasks"] == str(tasks)
    assert options["--ntasks-per-node"] == str(per_node)
    assert options["--cpus-per-task"] == str(cores)
    assert options["--gpus-per-node"] == "4"
    assert options["--gpu-bind"] == "none"  # jax picks a GPU of a node by the task's number
    assert options["--kill-on-bad-exit"] == "0"
    assert local_ids == devices
    program = arguments[next(i for i, a in enumerate(arguments) if a.endswith("/soup-jax")) :]
    assert program[1:] == [
        "train",
        "--config=c.py",
        f"--workdir={slurm.workdir}",
        "--config.mesh.platform=gpu",
        "--config.mesh.num_devices=8",
        "--config.seed=1",
    ]
    table = done.stdout.splitlines()[0]
    assert "2 nodes (gpu[01-02]) x 4 GPUs = 8 devices" in table
    assert f"{tasks} processes with {4 // per_node} GPUs each" in table
    secret = (slurm.workdir.parent / "bin" / "secret").read_text()
    assert re.fullmatch("[0-9a-f]{64}", secret)
    assert secret not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("status", "saved", "requeued", "code"),
    [
        (0, 10, False, 0),  # finished
        (0, 4, True, 0),  # saved and stopped
        (0, None, True, 0),  # stopped before there was anything to save
        (143, 4, True, 0),  # SIGTERM before the program listened
        (1, 4, False, 1),
        (2, None, False, 2),
        (137, 4, False, 137),
    ],
)
def test_slurm_requeues_what_was_stopped_and_not_what_failed(slurm, status, saved, requeued, code):
    if saved is not None:
        make_run(slurm.workdir, num_steps=10, saved=saved)
    done, made = slurm(status)
    assert (["scontrol", ["requeue", "7"]] in made) == requeued, done.stderr
    assert done.returncode == code


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PREEMPTED"])
def test_slurm_does_not_undo_a_cancellation(slurm, state):
    done, made = slurm(0, state=state)
    assert made[1:] == [["scontrol", ["--oneliner", "show", "job", "7"]]]
    assert "Slurm ends or requeues the job itself" in done.stderr


def test_slurm_requeues_only_so_often(slurm):
    for restarts, requeued in (("2", True), ("3", False)):
        done, made = slurm(0, SLURM_RESTART_COUNT=restarts, MAX_RESTARTS="3")
        assert (made[-1] == ["scontrol", ["requeue", "7"]]) == requeued
    assert done.returncode == 1
    assert "MAX_RESTARTS" in done.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SLURM_GPUS_ON_NODE": ""}, "no GPU on the first node"),
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, "4 GPUs on the first node, but 8 were asked for"),
        ({"SLURM_NTASKS_PER_NODE": "2"}, "--ntasks-per-node=2 does not fit PROCESS_PER=gpu"),
        ({"SLURM_CPUS_ON_NODE": "3"}, "3 CPU cores for 4 processes"),
        ({"PROCESS_PER": "rack"}, "neither gpu nor node"),
        ({"SLURM_JOB_NUM_NODES": ""}, "not in a Slurm job"),
    ],
)
def test_slurm_refuses_what_does_not_fit(slurm, env, message):
    done, made = slurm(0, **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert not made


def test_slurm_is_submitted_from_the_repository(tmp_path):
    done = run_script("launch/slurm.sbatch", "c", "w", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "submit from the root" in done.stderr


# --------------------------------------------------------------------------- finished.py and pod.py


def finished(workdir: pathlib.Path) -> int:
    return subprocess.run([sys.executable, str(LAUNCH / "finished.py"), str(workdir)]).returncode


def test_finished_reads_what_training_writes(tiny_run, tmp_path):
    assert finished(tiny_run) == 0
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    shutil.rmtree(max((copy / "checkpoints").iterdir(), key=lambda p: int(p.name)))
    assert finished(copy) == 1
    assert finished(tmp_path / "none") == 1


def start_pod(tmp_path: pathlib.Path, program: str) -> subprocess.Popen:
    stub(tmp_path / "bin" / "soup-jax", program)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, str(LAUNCH / "pod.py"), "c.py", str(tmp_path / "run")]
    return subprocess.Popen(
        command, env={**outside(), "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize(
    ("program", "saved", "code"),
    [
        ("", 10, 0),
        ("", 4, 75),
        ("", None, 75),
        ("sys.exit(2)", 4, 2),
        ("sys.exit(1)", 10, 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", 10, 137),
    ],
)
def test_pod_ends_with_0_only_if_the_run_is_finished(tmp_path, program, saved, code):
    if saved is not None:
        make_run(tmp_path / "run", num_steps=10, saved=saved)
    process = start_pod(tmp_path, program)
    process.communicate()
    assert process.returncode == code


def test_pod_passes_sigterm_on_and_asks_for_a_restart(tmp_path):
    make_run(tmp_path / "run", num_steps=10, saved=4)
    program = """
received = []
signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
(here / "ready").touch()
for _ in range(1500):  # not for ever: a signal that is lost shall fail the test, not hang it
    if received:
        break
    time.sleep(0.02)
else:
    sys.exit(99)
log("saved")
"""
    process = start_pod(tmp_path, program)
    wait_for(tmp_path / "bin" / "ready", process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75
    assert calls(tmp_path / "bin") == [["saved"]]


# -------------------------------------------------------------------------------- gke_jobset_*.yaml


def job_of(manifest: pathlib.Path) -> dict:
    """The Job template of a JobSet with one."""
    (replicated,) = yaml.safe_load(manifest.read_text("utf-8"))["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    return replicated["template"]["spec"]


def container(manifest: pathlib.Path) -> dict:
    (found,) = job_of(manifest)["template"]["spec"]["containers"]
    return found


def num_devices(manifest: pathlib.Path) -> int:
    (value,) = [a for a in container(manifest)["args"] if a.startswith("--config.mesh.num_devices")]
    return int(value.partition("=")[2])


def test_there_is_a_manifest_for_tpu_and_gpu():
    assert [m.name for m in MANIFESTS] == ["gke_jobset_gpu.yaml", "gke_jobset_tpu.yaml"]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: m.stem)
def test_jobsets_hang_together(manifest):
    (document,) = yaml.safe_load_all(manifest.read_text("utf-8"))  # two would start two runs
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert document["kind"] == "JobSet"
    job, spec = job_of(manifest), job_of(manifest)["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    assert job["completionMode"] == "Indexed"
    kind = manifest.stem.rpartition("_")[2]
    resource = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}[kind]
    resources = container(manifest)["resources"]
    assert resources["requests"] == resources["limits"]
    assert job["completions"] * resources["limits"][resource] == num_devices(manifest)
    assert f"--config.mesh.platform={kind}" in container(manifest)["args"]
    mounts = {m["name"]: m["mountPath"] for m in container(manifest)["volumeMounts"]}
    assert mounts.keys() == {v["name"] for v in spec["volumes"]}
    _, script = container(manifest)["command"]
    assert (ROOT / script).is_file()
    config, workdir, corpus = container(manifest)["args"][:3]
    assert (ROOT / config).is_file()
    for path in (workdir, corpus.partition("=")[2]):
        assert path.startswith(mounts["data"] + "/")
    constant = re.search(r"^SAVED_NOT_FINISHED = (\d+)", (LAUNCH / "pod.py").read_text(), re.M)
    rules = job["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [int(constant[1])]
    assert rules[0]["onExitCodes"]["containerName"] == container(manifest)["name"]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: m.stem)
def test_jobsets_restart_without_end_after_evictions_only(manifest):
    job, spec = job_of(manifest), job_of(manifest)["template"]["spec"]
    # Kubernetes allows a podFailurePolicy with this one only; and a pod that restarts in place
    # would wait for processes that are gone.
    assert spec["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 0
    assert {r["action"] for r in job["podFailurePolicy"]["rules"]} == {"FailJob"}
    conditions = job["podFailurePolicy"]["rules"][1]["onPodConditions"]
    assert conditions == [{"type": "DisruptionTarget", "status": "True"}]
    policy = yaml.safe_load(manifest.read_text("utf-8"))["spec"]["failurePolicy"]
    assert 0 < policy["maxRestarts"] < 100
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert spec["terminationGracePeriodSeconds"] >= 300


def test_tpu_jobset_has_a_pod_for_every_host_of_the_slice():
    manifest = LAUNCH / "gke_jobset_tpu.yaml"
    selector = job_of(manifest)["template"]["spec"]["nodeSelector"]
    topology = selector["cloud.google.com/gke-tpu-topology"]
    assert math.prod(map(int, topology.split("x"))) == num_devices(manifest)
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    annotations = yaml.safe_load(manifest.read_text("utf-8"))["metadata"]["annotations"]
    assert annotations == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


def test_gpu_jobset_tells_the_pods_of_each_other():
    manifest = LAUNCH / "gke_jobset_gpu.yaml"
    document = yaml.safe_load(manifest.read_text("utf-8"))
    env = {e["name"]: e.get("value") or e["valueFrom"] for e in container(manifest)["env"]}
    (job,) = document["spec"]["replicatedJobs"]
    host, _, port = env["SOUP_JAX_COORDINATOR"].partition(":")
    first = f"{document['metadata']['name']}-{job['name']}-0-0"
    assert host == f"{first}.{document['spec']['network']['subdomain']}"
    assert 1024 < int(port) < 65536
    assert document["spec"]["network"]["enableDNSHostnames"] is True
    assert env["SOUP_JAX_NUM_PROCESSES"] == str(job_of(manifest)["completions"])
    # Not $(JOB_COMPLETION_INDEX): that variable is added after the ones that could refer to it.
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert env["SOUP_JAX_PROCESS_ID"] == {"fieldRef": {"fieldPath": index}}
    assert (
        "cloud.google.com/gke-accelerator" in job_of(manifest)["template"]["spec"]["nodeSelector"]
    )


# --------------------------------------------------------------------------------------- tpu_vm.sh


@pytest.fixture
def tpu_host(tmp_path: pathlib.Path):
    """A `gcloud` that runs the commands for the hosts here, in a home folder of their own."""
    home = tmp_path / "home"
    host = home / "soup_jax" / ".venv" / "bin"
    stub(
        host / "soup-jax",
        """
received = []
signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
log(sys.argv[1:])
(here / "secret").write_text(os.environ["SOUP_JAX_SECRET"])
(here / "ready").touch()
for _ in range(1500 if "wait" in sys.argv[-1] else 0):
    if received:
        break
    time.sleep(0.02)
log("saved" if received else "done")
sys.exit(3 * (not received))
""",
    )
    stub(
        tmp_path / "bin" / "gcloud",
        f"""
log(sys.argv[1:])
if "scp" in sys.argv:  # to home folders
    source, (_, name) = sys.argv[5], sys.argv[6].split(":")
    (pathlib.Path({str(home)!r}) / name).write_text(pathlib.Path(source).read_text())
given = [a.partition("=")[2] for a in sys.argv if a.startswith("--command=")]
sys.exit(subprocess.run(["bash", "-c", given[0]], cwd={str(home)!r}).returncode if given else 0)
""",
    )
    env = {"TPU": "slice", "ZONE": "z-a", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    return host, tmp_path / "bin", env


linux_hosts = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="TPU hosts run Linux; their tail knows --pid"
)


@linux_hosts
def test_tpu_vm_runs_the_command_on_all_hosts_and_follows_the_first(tpu_host):
    host, bin_, env = tpu_host
    done = run_script("launch/tpu_vm.sh", CONFIG, WORKDIR, *FLAGS, **env, PROJECT="p")
    platform = "--config.mesh.platform=tpu"
    expected = ["train", f"--config={CONFIG}", f"--workdir={WORKDIR}", platform, *FLAGS]
    assert calls(host) == [[expected], ["done"]]
    copy, start, follow = (c[0] for c in calls(bin_))
    assert copy[:4] == ["compute", "tpus", "tpu-vm", "scp"]
    assert "--worker=all" in copy
    secret = (host / "secret").read_text()
    assert re.fullmatch("[0-9a-f]{64}", secret)
    assert secret not in done.stdout + (host.parents[1] / "train.log").read_text()
    assert not pathlib.Path(copy[4]).exists()
    assert not (host.parents[2] / "soup_jax_secret").exists()
    for command, worker in ((start, "all"), (follow, "0")):
        where = ["--zone=z-a", "--project=p", f"--worker={worker}"]
        assert command[:8] == ["compute", "tpus", "tpu-vm", "ssh", "slice", *where]
    # The log opens with the command as one could type it, and ends with how it ended.
    log = (host.parents[1] / "train.log").read_text().splitlines()
    assert commands_in(log[0])[0][1:] == expected
    assert log[-1] == "exit status 3"
    assert log[-1] in done.stdout


@linux_hosts
def test_tpu_vm_stop_reaches_the_program_and_a_second_run_is_refused(tpu_host):
    host, _, env = tpu_host
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "tpu_vm.sh"), "c", "w", "--config.name=wait"],
        env={**outside(), **env},
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(host / "ready", process)
    second = run_script("launch/tpu_vm.sh", "c", "w2", check=False, **env)
    assert second.returncode == 1
    assert "a run is under way" in second.stderr
    run_script("launch/tpu_vm.sh", "--stop", **env)
    out, _ = process.communicate()
    assert calls(host)[1:] == [["saved"]]
    assert "exit status 0" in out


def test_tpu_vm_installs_the_commit_on_all_hosts(tmp_path):
    env = {"TPU": "slice", "ZONE": "z", "PYTHON": "python3.12", "TMPDIR": str(tmp_path)}
    archive, copy, install = dry_run(tmp_path, "launch/tpu_vm.sh", "--install", **env)
    assert archive[:2] == ["git", "archive"]
    assert archive[-1] == "HEAD"
    (file,) = [a.partition("=")[2] for a in archive if a.startswith("--output=")]
    assert copy[5:7] == [file, "slice:soup_jax.tar.gz"]
    assert "--worker=all" in copy
    assert "--worker=all" in install
    command = install[-1].partition("=")[2]
    subprocess.run(["bash", "-n", "-c", command], check=True)
    assert "python3.12 -m venv .venv" in command
    assert "-e '.[tpu]'" in command
    extras = re.search(r"^tpu = ", (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    assert extras


# ------------------------------------------------------------------------------- prepare_slurm.sh

# Runs what is submitted at once, each job of an array in turn.
SBATCH = """#!/bin/bash
last=0
for argument in "$@"; do
  case "$argument" in --array=0-*) last=${argument#--array=0-} ;; esac
done
for i in $(seq 0 "$last"); do
  SLURM_ARRAY_TASK_ID=$i bash -c "${!#}" >> "$LOG" 2>&1 || exit 1
done
echo 17
"""


def test_prepare_is_submitted_in_rounds_of_shards_and_merges(tmp_path):
    env = {"VENV": "/v", "SBATCH": "--mem=1G --time=1", "MERGE": "--mem=9G"}
    commands = dry_run(tmp_path, "launch/prepare_slurm.sh", "64", "c.py", "--config.a=b c", **env)
    assert len(commands) == 10
    first, merge, second = commands[:3]
    assert first[-1].endswith(
        r"prepare --config=c.py --config.a=b\ c --shard=$SLURM_ARRAY_TASK_ID/64"
    )
    assert first[-1].startswith("/v/bin/soup-jax ")
    assert {"--array=0-63", "--mem=1G", "--time=1"} < set(first)
    assert not any(argument.startswith("--dependency") for argument in first)
    assert merge[-1].endswith("--merge || [ $? -eq 75 ]")
    assert commands[-1][-1].endswith("--merge")
    assert merge.index("--mem=9G") > merge.index("--mem=1G")
    assert {"--dependency=afterok:JOB", "--array=0-63"} < set(second)
    assert "--array=0-63" not in merge
    for arguments in ((), ("3",), ("x", "c.py"), ("0", "c.py")):
        done = run_script("launch/prepare_slurm.sh", *arguments, check=False)
        assert done.returncode == 2
        assert "SHARDS" in done.stderr


@pytest.mark.slow
def test_prepare_by_arrays_of_jobs_ends_with_a_corpus(tmp_path):
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text(SBATCH)
    stub.chmod(0o755)
    texts = "".join(
        f'{{"text": "number {i} of {i % 7} kinds of {i % 5} texts"}}\n' for i in range(99)
    )
    (tmp_path / "text.jsonl").write_text(texts)
    run_script(
        "launch/prepare_slurm.sh",
        "2",
        str(ROOT / "experiments" / "base.py"),
        f"--config.corpus.sources={tmp_path / 'text.jsonl'}",
        f"--config.corpus.dir={tmp_path / 'corpus'}",
        "--config.num_domains=3",
        "--config.vocab_size=300",
        "--config.seq_len=16",
        "--config.domain_weights.support_size=3",
        VENV=str(pathlib.Path(sys.executable).parents[1]),
        PATH=f"{stub.parent}:{os.environ['PATH']}",
        LOG=str(tmp_path / "log"),
    )
    assert (tmp_path / "corpus" / "manifest.json").exists(), (tmp_path / "log").read_text()


# --------------------------------------------------------------------------------- sweep_slurm.sh


def test_a_sweep_is_an_array_of_shards_and_then_a_table(tmp_path):
    given = ("8", "c.py", "w w", "--sweep.a=1,2", "--config.a=b c")
    env = {"VENV": "/v", "SBATCH": "--mem=1G --gpus=1"}
    array, table = dry_run(tmp_path, "launch/sweep_slurm.sh", *given, **env)
    assert {"--array=0-7", "--mem=1G", "--gpus=1"} < set(array)
    assert shlex.split(array[-1]) == [
        *("/v/bin/soup-jax", "sweep", "--config=c.py", "--workdir=w w"),
        *("--sweep.a=1,2", "--config.a=b c", "--shard=$SLURM_ARRAY_TASK_ID/8"),
    ]
    assert "--dependency=afterany:JOB" in table
    assert shlex.split(table[-1]) == ["/v/bin/soup-jax", "sweep", "--workdir=w w", "--table"]
    for arguments in ((), ("3", "c.py"), ("x", "c.py", "w"), ("0", "c.py", "w")):
        done = run_script("launch/sweep_slurm.sh", *arguments, check=False)
        assert done.returncode == 2
        assert "JOBS" in done.stderr


def test_a_sweep_with_a_mistake_is_not_submitted(tmp_path):
    stub(tmp_path / "bin" / "sbatch", "log(*sys.argv[1:])\nprint(17)\n")
    stub(tmp_path / "v" / "bin" / "soup-jax", "log(*sys.argv[1:])\nsys.exit('x' in sys.argv)\n")
    env = {"VENV": str(tmp_path / "v"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = run_script("launch/sweep_slurm.sh", "2", "c.py", "w", "x", check=False, **env)
    assert done.returncode == 1
    assert calls(tmp_path / "bin") == []
    run_script("launch/sweep_slurm.sh", "2", "c.py", "w", **env)
    first, second = calls(tmp_path / "bin")
    assert "--array=0-1" in first
    assert "--dependency=afterany:17" in second
    assert calls(tmp_path / "v" / "bin")[-1][-1] == "--dry_run"
