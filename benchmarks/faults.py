"""Kills commands at random moments, runs them again, and compares what comes of it.

    python benchmarks/faults.py --kills=25 --seed=0

Each of prepare, train, evaluate and instantiate is run once undisturbed, on a corpus and a soup of
seconds. Then, `--kills` times each, it is started, killed by SIGKILL (or stopped by SIGTERM, every
fourth time) after a random part of that time, and started again until it ends. Every time its
result is compared with the undisturbed one: artefacts by hash, checkpoints by their checksums,
metrics line by line but for times. Printed as a line of JSON are, by command: kills, results that
differ, starts that ended otherwise than with 0, the most steps that were logged and then done again
(a save comes every 5 steps, and one that is under way is lost too), temporary files left at the
end, and seconds from a kill to the next finished result.
"""

import argparse
import dataclasses
import json
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from soup_jax.inputs import sha256_file

SAVE_EVERY = 5
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
TIMES = ("step_ms", "data_wait_ms", "tokens_per_second")


def fields(here: pathlib.Path) -> dict:
    """A config whose commands take seconds."""
    return {
        "num_domains": 4,
        "num_experts": 4,
        "num_mixtures": 2,
        "vocab_size": 400,
        "seq_len": 32,
        "batch_size": 16,
        "num_steps": 60,
        "corpus.sources": (str(here / "generic.jsonl"),),
        "corpus.dir": str(here / "corpus"),
        "corpus.validation_fraction": 0.1,
        "embed.dim": 8,
        "model.dim": 32,
        "model.hidden_dim": 48,
        "model.num_heads": 2,
        "model.num_kv_heads": 2,
        "domain_weights.support_size": 2,
        "domain_weights.min_support_size": 1,
        "optimizer.warmup_steps": 5,
        "checkpoint.every_steps": SAVE_EVERY,
        "log.every_steps": 4,
        "log.trackers": (),
        "evaluate.max_windows": 8,
        "evaluate.specialists": (str(here / "cooking.jsonl"),),
    }


def write_text(here: pathlib.Path) -> None:
    """Documents of a few topics, and one specialist's."""
    rng = random.Random(0)
    for name, topics, count in (("generic", list(WORDS), 400), ("cooking", ["cooking"], 60)):
        with open(here / f"{name}.jsonl", "w", encoding="utf-8") as f:
            for i in range(count):
                words = rng.choices(WORDS[topics[i % len(topics)]] + ["the", "of"], k=120)
                f.write(json.dumps({"text": f"{' '.join(words)} {name} {i}"}) + "\n")


@dataclasses.dataclass
class Command:
    """A command, where it writes, and what is compared of that."""

    name: str
    arguments: list[str]
    out: pathlib.Path
    result: Callable[[], object]

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "soup_jax.cli", self.name, *self.arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self) -> tuple[int, float, str]:
        """(status, seconds, output) of a start that nobody disturbs."""
        begin = time.monotonic()
        process = self.start()
        output, _ = process.communicate()
        return process.returncode, time.monotonic() - begin, output


def hashes(folder: pathlib.Path, *names: str) -> dict[str, str]:
    return {name: sha256_file(folder / name) for name in names}


def train_result(run: pathlib.Path) -> object:
    steps = [int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()]
    newest = run / "checkpoints" / str(max(steps))
    data = json.loads((newest / "data" / "metadata").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return data["step"], data["checksums"], data["cursors"], lines


def commands(here: pathlib.Path) -> list[Command]:
    config, run, corpus = here / "config.py", here / "run", here / "corpus"
    config.write_text(CONFIG.format(fields=fields(here)))
    made, numbers = here / "made", here / "numbers" / "evaluation.json"
    documents = here / "cooking.jsonl"
    return [
        Command(
            "prepare",
            [f"--config={config}"],
            corpus,
            lambda: json.loads((corpus / "manifest.json").read_text())["fingerprint"],
        ),
        Command(
            "train",
            [f"--config={config}", f"--workdir={run}"],
            run,
            lambda: train_result(run),
        ),
        Command(
            "evaluate",
            [f"--workdir={run}", f"--json={numbers}"],
            numbers.parent,
            lambda: hashes(numbers.parent, "evaluation.json"),
        ),
        Command(
            "instantiate",
            [f"--run={run}", f"--documents={documents}", f"--out={made}"],
            made,
            lambda: hashes(made, "params.safetensors", "tokenizer.json", "recipe.json"),
        ),
    ]


def newest_step(run: pathlib.Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines() if run.exists() else []
    return max((json.loads(x)["step"] for x in lines if x.endswith("}")), default=0)


def leftovers(here: pathlib.Path) -> list[str]:
    """Temporary files and folders of ours and of orbax."""
    names = ("*.tmp", "*.old", "*orbax-checkpoint-tmp*", ".work", ".secret")
    return sorted(str(p.relative_to(here)) for name in names for p in here.rglob(name))


def disturb(command: Command, seconds: float, kills: int, rng: random.Random) -> dict:
    """Kill it `kills` times, each from a fresh start and on to the end; what came of that."""
    expected, differ, failed, again = command.result(), 0, 0, 0
    left: set[str] = set()
    took = []
    for number in range(kills):
        shutil.rmtree(command.out, ignore_errors=True)
        name = signal.SIGTERM if number % 4 == 3 and command.name == "train" else signal.SIGKILL
        process = command.start()
        time.sleep(rng.random() * seconds)
        process.send_signal(name)
        process.communicate()
        before = newest_step(command.out) if command.name == "train" else 0
        status, needed, output = command.finish()
        took.append(needed)
        failed += status != 0
        differ += status == 0 and command.result() != expected
        left |= set(leftovers(command.out.parent))
        if found := re.search(r"starting at step (\d+)", output):
            again = max(again, before - int(found[1]))
    return {
        "command": command.name,
        "kills": kills,
        "differ": differ,
        "failed": failed,
        "steps again": again,
        "left": sorted(left),
        "seconds": statistics.median(took),
        "undisturbed": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default="prepare,train,evaluate,instantiate")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        here = pathlib.Path(folder)
        write_text(here)
        made = commands(here)
        for command in made:
            command.finish()  # compiles
            shutil.rmtree(command.out, ignore_errors=True)
            status, seconds, output = command.finish()
            assert status == 0, f"{command.name} does not run undisturbed:\n{output}"
            if command.name in given.commands.split(","):
                print(json.dumps(disturb(command, seconds, given.kills, rng)), flush=True)


if __name__ == "__main__":
    main()
