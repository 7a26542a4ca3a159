"""What the fault injection works on: small text and config, the commands and their results.

`Bench` holds a folder of its own with text, config, a corpus, a run and a specialist, and all that
commands leave outside of their results: temporary files and compiled code. Nothing here injects a
fault; `faults.py` kills, `fault_storage.py` damages what is stored.
"""

import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

import fault_serve

from soup_jax.cli import main as cli
from soup_jax.inputs import sha256_file

SAVE_EVERY = 5
NUM_STEPS = 30
HANGS = 600.0  # seconds after which a command counts as one that hangs
CONFIG = """
from soup_jax.experiments import base

def get_config():
    cfg = base.get_config()
    cfg.update_from_flattened_dict({fields!r})
    return cfg
"""
WORDS = {
    "cooking": "butter flour oven bake sugar dough simmer garlic onion pepper roast whisk".split(),
    "sailing": "wind harbour keel tack mast anchor tide rudder sail hull compass storm".split(),
    "algebra": "ring ideal module kernel group lemma proof morphism field basis tensor".split(),
}
MANY = """
specialists:
  searched: {documents: cooking.jsonl, method: search}
  topic: {text: wind harbour keel, formats: [hf]}
  blended: {blend: {searched: 1, topic: 1}}
"""
TIMES = ("step_ms", "data_wait_ms", "tokens_per_second", "crc32")
STEP = re.compile(r" step \d+/\d+ ")


@dataclasses.dataclass
class Done:
    """What a command left to say: status (None: it hung), output, and seconds."""

    status: int | None
    out: str
    log: str
    seconds: float
    first_step: float | None  # seconds to the first step of training

    @property
    def last_line(self) -> str:
        lines = [x for x in (self.log + self.out).splitlines() if x.strip()]
        told = [x for x in lines if x.startswith("soup-jax: error:")]
        return (told or lines or [""])[-1]


class Running:
    """A started command; its log is read as it comes."""

    def __init__(self, process: Any, out: pathlib.Path, log: pathlib.Path):
        """`process` is a Popen, or what has its methods; it writes to these files."""
        self.begin = time.monotonic()
        self.process, self._out, self._log = process, out, log
        self.first_step: float | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.first_step is None and self.process.returncode is None:
            if STEP.search(self._log.read_text(errors="replace")):
                self.first_step = time.monotonic() - self.begin
            time.sleep(0.02)

    def await_step(self, step: int) -> None:
        """Until the command has logged this step of training, or has ended."""
        while self.process.poll() is None and f" step {step}/" not in self._log.read_text():
            time.sleep(0.01)

    def wait(self, seconds: float = HANGS) -> Done:
        """Until it has ended; after so many seconds it is killed, and its status is None."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = None
        took = time.monotonic() - self.begin
        out, log = (path.read_text(errors="replace") for path in (self._out, self._log))
        return Done(status, out, log, took, self.first_step)


class Served(Running):
    """A server that is asked once and then interrupted; the answers are its last line."""

    def __init__(self, process: Any, out: pathlib.Path, log: pathlib.Path, documents: pathlib.Path):
        super().__init__(process, out, log)
        given = (process, out, log, documents)
        threading.Thread(target=fault_serve.ask, args=given, daemon=True).start()

    def wait(self, seconds: float = HANGS) -> Done:
        done = super().wait(seconds)
        return dataclasses.replace(done, status=0) if done.status == 130 else done


class Forked:
    """A command in a fork of this process, which has imported the package already."""

    def __init__(
        self,
        arguments: list[str],
        env: Mapping[str, str],
        out: pathlib.Path,
        log: pathlib.Path,
        file_kib: int,
    ):
        sys.stdout.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(arguments, env, out, log, file_kib)

    def _run(self, arguments: list[str], env: Mapping[str, str], *files: Any) -> None:
        out, log, file_kib = files
        status = 1
        try:
            os.environ.update(env)
            for number, path in ((1, out), (2, log)):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
            if file_kib:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_kib << 10, file_kib << 10))
            status = cli.run(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, seconds: float = HANGS) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("fork", seconds)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Bench:
    """A folder with text and a config whose commands take seconds."""

    forks = False  # whether commands run in forks of this process
    file_kib = 0  # the largest file that such a command may write

    def __init__(self, here: pathlib.Path, disk: str = "."):
        """`disk` is the folder below `here` where commands write their results."""
        self.here, self.disk = here, here / disk
        names = ("corpus", "run", "made", "numbers", "many", "soup", "tuned", "exported")
        self.corpus, self.run, self.made, self.numbers, *more = (self.disk / n for n in names)
        self.many, self.soup, self.tuned, self.exported = more
        self.recipe = here / "many.yaml"
        self.config, self.documents = here / "config.py", here / "cooking.jsonl"
        self.temporary = here / "tmp"
        self._count = 0
        for name in ("tmp", "cache", "logs", disk):
            (here / name).mkdir(exist_ok=True)
        self._write_text()
        self.write_config()
        config, prompt = f"--config={self.config}", "--prompt=butter flour"
        numbers = self.numbers / "evaluation.json"
        self.arguments = {
            "prepare": [config],
            "train": [config, f"--workdir={self.run}"],
            "evaluate": [f"--workdir={self.run}", f"--json={numbers}"],
            "instantiate": [
                f"--run={self.run}",
                f"--documents={self.documents}",
                f"--out={self.made}",
            ],
            "many": [f"--run={self.run}", f"--recipe={self.recipe}", f"--out={self.many}"],
            "pack": [f"--run={self.run}", f"--out={self.soup}"],
            "finetune": [
                f"--model={self.made}",
                f"--documents={self.documents}",
                f"--out={self.tuned}",
                "--max_steps=20",
            ],
            "export": [f"--model={self.made}", "--format=hf", f"--out={self.exported}"],
            "generate": [f"--model={self.made}", prompt, "--max_tokens=20"],
            "score": [f"--model={self.made}", f"--documents={self.documents}"],
            "verify": [str(self.run)],
            "plan": [config, "--chip=H200", "--num_devices=1"],
            "serve": [f"--run={self.run}", "--port=0"],
        }
        self.writes = {
            "prepare": self.corpus,
            "train": self.run,
            "evaluate": self.numbers,
            "instantiate": self.made,
            "many": self.many,
            "pack": self.soup,
            "finetune": self.tuned,
            "export": self.exported,
        }

    def write_config(self, **more: Any) -> None:
        """The config of all commands, with other values of some fields."""
        self.config.write_text(CONFIG.format(fields=self._fields() | more))

    def _fields(self) -> dict[str, Any]:
        return {
            "num_domains": 4,
            "num_experts": 4,
            "num_mixtures": 2,
            "vocab_size": 400,
            "seq_len": 32,
            "batch_size": 16,
            "num_steps": NUM_STEPS,
            "corpus.sources": (str(self.here / "generic.jsonl"),),
            "corpus.dir": str(self.corpus),
            "corpus.validation_fraction": 0.1,
            "embed.dim": 8,
            "model.dim": 32,
            "model.hidden_dim": 48,
            "model.num_layers": 1,
            "model.num_heads": 2,
            "model.num_kv_heads": 2,
            "domain_weights.support_size": 2,
            "domain_weights.min_support_size": 1,
            "optimizer.warmup_steps": 5,
            # Above the noise of sums in another order, see tests/topology_test.py.
            "optimizer.eps": 1e-5,
            "checkpoint.every_steps": SAVE_EVERY,
            "log.every_steps": 1,
            # Of a process that is killed before it has joined nobody can tell that it is not late.
            "distributed.init_timeout_secs": 45,
            "evaluate.max_windows": 8,
            "evaluate.specialists": (str(self.documents),),
        }

    def _write_text(self) -> None:
        # Documents of a few topics, and one specialist's.
        rng = random.Random(0)
        for name, topics, count in (("generic", list(WORDS), 400), ("cooking", ["cooking"], 60)):
            with open(self.here / f"{name}.jsonl", "w", encoding="utf-8") as f:
                for i in range(count):
                    words = rng.choices(WORDS[topics[i % len(topics)]] + ["the", "of"], k=120)
                    f.write(json.dumps({"text": f"{' '.join(words)} {name} {i}"}) + "\n")
        self.recipe.write_text(MANY)

    def start(self, name: str, *more: str, devices: int = 1, **env: str) -> Running:
        """Start a command on so many simulated devices."""
        self._count += 1
        out, log = (self.here / "logs" / f"{self._count}.{kind}" for kind in ("out", "log"))
        out.touch()
        log.touch()
        command = "instantiate" if name == "many" else name
        arguments = [command, *self.arguments[name], *more]
        env = self.env(devices, **env)
        if self.forks:
            return Running(Forked(arguments, env, out, log, self.file_kib), out, log)
        command = [sys.executable, "-m", "soup_jax.cli", *arguments]
        with out.open("ab") as stdout, log.open("ab") as stderr:
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=env)
        if name == "serve":
            return Served(process, out, log, self.documents)
        return Running(process, out, log)

    def finish(self, name: str, *more: str, **how: Any) -> Done:
        """Run a command that nobody disturbs."""
        return self.start(name, *more, **how).wait()

    def env(self, devices: int, **more: str) -> dict[str, str]:
        """The environment of a command."""
        flags = f"--xla_force_host_platform_device_count={devices}"
        flags += " --xla_backend_optimization_level=0"  # much is compiled, little computed
        mine = {"TMPDIR": str(self.temporary), "XDG_CACHE_HOME": str(self.here / "cache")}
        return {**os.environ, **mine, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **more}

    def clean(self, name: str) -> None:
        """Remove what the command writes."""
        if name in self.writes:
            shutil.rmtree(self.writes[name], ignore_errors=True)

    def result(self, name: str, done: Done) -> Any:
        """What must be the same every time the command is run to its end."""
        if name == "prepare":
            return json.loads((self.corpus / "manifest.json").read_text())["fingerprint"]
        if name == "train":
            return train_result(self.run)
        if name == "evaluate":
            # Not the last line: the picture is no result, and a full disk may prevent it.
            table = done.out.partition("learning curve: ")[0]
            return table, sha256_file(self.numbers / "evaluation.json")
        if name in ("instantiate", "many", "pack", "finetune", "export"):
            folder = self.writes[name]
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            return {str(p.relative_to(folder)): sha256_file(p) for p in files}
        return json.loads(done.out.splitlines()[-1]) if name == "serve" else done.out

    def leftovers(self) -> set[str]:
        """Temporary files and folders of ours and of orbax, and whatever is in the TMPDIR."""
        names = ("*.tmp", "*.old", "*orbax-checkpoint-tmp*", ".work", ".secret")
        found = {p for name in names for p in self.here.rglob(name)}
        found |= set(self.temporary.iterdir())
        return {re.sub(r"\d+", "N", str(p.relative_to(self.here))) for p in found}

    def contents(self) -> dict[str, str]:
        """A hash of every file but those of logs, temporary folder and compiled code."""
        besides = {self.here / name for name in ("tmp", "cache", "logs")}
        files = [p for p in sorted(self.here.rglob("*")) if not besides & set(p.parents)]
        return {str(p): sha256_file(p) if p.is_file() else "" for p in files if p not in besides}


def newest_data(run: pathlib.Path) -> dict[str, Any]:
    """The data item of the newest checkpoint."""
    steps = [int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()]
    return json.loads((run / "checkpoints" / str(max(steps)) / "data" / "metadata").read_text())


def metrics_lines(run: pathlib.Path) -> list[dict[str, Any]]:
    """The sound lines of metrics.jsonl without times."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(x) for x in text.splitlines(keepends=True) if x.endswith("}\n")]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def train_result(run: pathlib.Path) -> dict[str, Any]:
    """Step, checksums and cursors of the newest checkpoint, and all lines of metrics."""
    data = newest_data(run)
    return {name: data[name] for name in ("step", "checksums", "cursors")} | {
        "lines": metrics_lines(run)
    }


def compare_runs(have: dict[str, Any], want: dict[str, Any], *, bits: bool) -> float:
    """The largest difference of a loss in nats; infinite if anything else differs.

    With `bits` all must be equal. Without, on another mesh, what is promised is: the same steps
    and the same batches.
    """
    if bits:
        return 0.0 if have == want else float("inf")
    same = [
        (x["step"], [(v["step"], v["batch_hash"]) for v in x["lines"]], x["cursors"])
        for x in (have, want)
    ]
    if same[0] != same[1]:
        return float("inf")
    pairs = zip(have["lines"], want["lines"])
    return max((abs(a["loss"] - b["loss"]) for a, b in pairs), default=0.0)
