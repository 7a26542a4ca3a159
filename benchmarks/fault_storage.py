"""Storage faults for `faults.py storage`: damaged files, a disk that is full, read-only or slow.

Corpus, run, specialist and numbers lie on a small disk in memory, which root can fill and make
read-only; without that right these cases are left out, with a sentence. Each case begins with the
same sound files: a run that was stopped in the middle, with two checkpoints, and all that can be
made from it. A case does one harm and runs one command, then undoes the harm and runs it again:

    refused        status 2 and one sentence
    same           status 0, and the result is that of the undisturbed command
    same, told     as before, and the command names the damage; lines of metrics.jsonl that were
                   damaged are lost
    FAULT          a traceback, a hang, another status, or another result without a word

and afterwards the result must be the undisturbed one, or something was lost.

Commands run in forks of this process, which has imported the package and compiled nothing: that
saves seconds for each of them. Slow disks are played by stopping the process for seconds at a time.
"""

import contextlib
import dataclasses
import importlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from fault_cases import Bench, Done, Running, metrics_lines

CHANGED = {"optimizer.learning_rate": 0.002}
HALF = 10  # the step that the run has passed when it is stopped
TOLD = ("damaged", "unreadable", "not valid JSON", "changed since", "dropped", "cannot", "full")


@dataclasses.dataclass
class Case:
    """One harm and the command that meets it.

    `harm` is done before the command starts, `later` to the running command; both return what
    undoes them.
    """

    name: str
    command: str
    harm: Callable[[Bench, random.Random], Callable[[], None]] | None = None
    later: Callable[[Bench, Running], Callable[[], None]] | None = None
    file_kib: int = 0  # the largest file that the command may write
    fresh: bool = False  # whether what the command writes is removed first
    needs_disk: bool = False


def largest(folder: pathlib.Path) -> pathlib.Path:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def newest(bench: Bench) -> pathlib.Path:
    folders = [p for p in (bench.run / "checkpoints").iterdir() if p.name.isdigit()]
    return max(folders, key=lambda p: int(p.name))


# What is damaged at rest, and the command that reads it.
FILES: dict[str, tuple[str, Callable[[Bench], pathlib.Path]]] = {
    "checkpoint: parameters": ("train", lambda b: largest(newest(b) / "params")),
    "checkpoint: optimizer": ("train", lambda b: largest(newest(b) / "opt_state")),
    "checkpoint: index of arrays": ("train", lambda b: newest(b) / "params" / "manifest.ocdbt"),
    "checkpoint: structure": ("train", lambda b: newest(b) / "params" / "_METADATA"),
    "checkpoint: data item": ("train", lambda b: newest(b) / "data" / "metadata"),
    "checkpoint: its metadata": ("train", lambda b: newest(b) / "_CHECKPOINT_METADATA"),
    "run: metrics.jsonl": ("train", lambda b: b.run / "metrics.jsonl"),
    "run: changes.jsonl": ("train", lambda b: b.run / "changes.jsonl"),
    "run: parameters.txt": ("train", lambda b: b.run / "parameters.txt"),
    "run: config.json, train": ("train", lambda b: b.run / "config.json"),
    "run: config.json, evaluate": ("evaluate", lambda b: b.run / "config.json"),
    "corpus: windows, train": ("train", lambda b: largest(b.corpus / "windows")),
    "corpus: windows, evaluate": ("evaluate", lambda b: validation_windows(b)),
    "corpus: offsets": ("train", lambda b: b.corpus / "offsets.safetensors"),
    "corpus: manifest": ("train", lambda b: b.corpus / "manifest.json"),
    "corpus: tokenizer": ("instantiate", lambda b: b.corpus / "tokenizer.json"),
    "corpus: centroids": ("instantiate", lambda b: b.corpus / "centroids.safetensors"),
    "corpus: embedder": ("instantiate", lambda b: b.corpus / "embedder.safetensors"),
    "specialist: recipe.json": ("generate", lambda b: b.made / "recipe.json"),
    "specialist: parameters": ("generate", lambda b: b.made / "params.safetensors"),
    "specialist: tokenizer": ("generate", lambda b: b.made / "tokenizer.json"),
    "evaluation.json": ("evaluate", lambda b: b.numbers / "evaluation.json"),
    "compiled code": ("train", lambda b: compiled_step(b)),
}


def validation_windows(bench: Bench) -> pathlib.Path:
    return next(p for p in sorted((bench.corpus / "windows").rglob("*validation*")) if p.is_file())


def compiled_step(bench: Bench) -> pathlib.Path:
    entries = (bench.here / "cache").rglob("jit_train_step-*-cache")
    return max(entries, key=lambda p: p.stat().st_mtime)


def flip(data: bytearray, rng: random.Random) -> bytearray:
    """One bit at a random place is another."""
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def digit(data: bytearray, rng: random.Random) -> bytearray:
    """One digit is another, as no parser would notice."""
    places = [i for i, c in enumerate(data) if c in b"123456789"]
    place = rng.choice(places)
    data[place] = rng.choice([c for c in b"123456789" if c != data[place]])
    return data


def cut(data: bytearray, rng: random.Random) -> bytearray:
    """The end is missing."""
    return data[: rng.randrange(len(data))]


def at_rest() -> Iterator[Case]:
    """A case for every kind of file and of damage."""
    for name, (command, find) in FILES.items():
        hows = [flip, cut]
        if "json" in name or "data item" in name or "manifest" in name or "structure" in name:
            hows.append(digit)
        for how in hows:

            def harm(bench: Bench, rng: random.Random, how=how, find=find) -> Callable[[], None]:
                path = find(bench)
                sound = path.read_bytes()
                damaged = how(bytearray(sound), rng)
                path.write_bytes(damaged)

                def undo() -> None:  # unless the command has written it anew
                    if path.exists() and path.read_bytes() == damaged:
                        path.write_bytes(sound)

                return undo

            yield Case(f"{name}, {how.__name__}", command, harm)


def fill(bench: Bench) -> Callable[[], None]:
    """Fill the disk but for a page; undone by removing the ballast."""
    ballast = bench.disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as f:
        while True:
            f.write(b"x" * 4096)
    with ballast.open("rb+") as f:
        f.truncate(max(0, ballast.stat().st_size - 4096))
    return lambda: ballast.unlink()


def read_only(bench: Bench) -> Callable[[], None]:
    # A plain remount is refused while a file is open for writing; one of a bind mount is not.
    mount("--bind", bench.disk, bench.disk)
    mount("-o", "remount,bind,ro", bench.disk)
    return lambda: subprocess.run(["umount", "-l", bench.disk], check=True)


def mount(*arguments: Any) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def in_training(harm: Callable[[Bench], Callable[[], None]]) -> Any:
    """Do it once the run has gone on for some steps."""

    def later(bench: Bench, running: Running) -> Callable[[], None]:
        while running.process.poll() is None and running.first_step is None:
            time.sleep(0.01)
        return harm(bench)

    return later


def replaced(find: Callable[[Bench], pathlib.Path]) -> Callable[[Bench], Callable[[], None]]:
    """Another file takes the place of this one."""

    def harm(bench: Bench) -> Callable[[], None]:
        path = find(bench)
        kept = path.with_name(path.name + ".kept")
        path.rename(kept)
        path.write_bytes(b"another file")
        return lambda: kept.replace(path)

    return harm


def removed(find: Callable[[Bench], pathlib.Path]) -> Callable[[Bench], Callable[[], None]]:
    """A folder is gone, for a while."""

    def harm(bench: Bench) -> Callable[[], None]:
        path, kept = find(bench), bench.disk / "moved_away"
        path.rename(kept)

        def undo() -> None:
            shutil.rmtree(path, ignore_errors=True)
            kept.rename(path)

        return undo

    return harm


def file_instead(bench: Bench, rng: random.Random) -> Callable[[], None]:
    undo = removed(lambda b: b.run / "checkpoints")(bench)
    (bench.run / "checkpoints").write_text("a file")

    def back() -> None:
        (bench.run / "checkpoints").unlink()
        undo()

    return back


def stopped(bench: Bench, running: Running) -> Callable[[], None]:
    """The process stands still for three seconds, three times."""
    for _ in range(3):
        running.process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        running.process.send_signal(signal.SIGCONT)
        time.sleep(0.2)
    return lambda: None


def small_cache(bench: Bench, rng: random.Random) -> Callable[[], None]:
    cache = bench.here / "cache"
    mount("-t", "tmpfs", "-o", "size=100k", "none", cache)
    return lambda: subprocess.run(["umount", "-l", cache], check=True)


def live() -> list[Case]:
    """Faults of the disk, and what happens to a run under way."""
    full, locked = (lambda b, rng: fill(b)), (lambda b, rng: read_only(b))
    disk = {"needs_disk": True}
    cases = []
    for command in ("prepare", "train", "evaluate", "instantiate"):
        cases.append(Case(f"full disk, {command}", command, full, fresh=True, **disk))
        cases.append(Case(f"read-only disk, {command}", command, locked, fresh=True, **disk))
    for command in ("generate", "verify"):
        cases.append(Case(f"full disk, {command}", command, full, **disk))
        cases.append(Case(f"read-only disk, {command}", command, locked, **disk))
    for name, find in (
        ("config.json of the run", lambda b: b.run / "config.json"),
        ("metrics.jsonl", lambda b: b.run / "metrics.jsonl"),
        ("a file of windows", lambda b: largest(b.corpus / "windows")),
    ):
        cases.append(
            Case(f"{name} replaced in training", "train", later=in_training(replaced(find)))
        )
    return [
        *cases,
        Case("disk filled in training", "train", later=in_training(fill), **disk),
        Case("disk made read-only in training", "train", later=in_training(read_only), **disk),
        Case("ulimit -f 40, train", "train", file_kib=40),
        Case("ulimit -f 40, prepare", "prepare", file_kib=40, fresh=True),
        Case("stopped for 3 s, thrice, in training", "train", later=stopped),
        Case("full disk for compiled code", "train", small_cache, **disk),
        Case(
            "checkpoints moved away in training",
            "train",
            later=in_training(removed(lambda b: b.run / "checkpoints")),
        ),
        Case("checkpoints is a file", "train", file_instead),
    ]


def verdict(bench: Bench, case: Case, done: Done, expected: Any) -> str:
    """The word of the docstring above."""
    if done.status is None:
        return "FAULT: hangs"
    if "Traceback" in done.log or "Fatal Python error" in done.log:
        return "FAULT: traceback"
    if done.status == 0:
        told = [x for x in done.log.splitlines() if any(word in x for word in TOLD)]
        result = bench.result(case.command, done)
        if case.command == "train" and told and result | {"lines": expected["lines"]} == expected:
            result = expected  # lines of metrics are lost with what was damaged in them
        if result != expected:
            return "FAULT: another result"
        return "same, told" if told else "same"
    one = sum(x.startswith("soup-jax: error:") for x in done.log.splitlines()) == 1
    return "refused" if done.status == 2 and one else f"FAULT: status {done.status}"


class Sound:
    """The sound files that each case begins with."""

    def __init__(self, bench: Bench):
        """Make them all, and what each command gives from them."""
        self.bench, self.expected = bench, {}
        self.kept = bench.here / "kept"
        self._run("prepare")
        self._run("train", as_name="train, new")
        bench.clean("train")
        self._stop_at(HALF // 2)
        bench.write_config(**CHANGED)  # for a changes.jsonl
        self._stop_at(HALF, "--accept_changes")
        for name in ("instantiate", "generate", "evaluate", "verify"):
            self._run(name)
        shutil.copytree(bench.disk, self.kept)
        self._run("train")
        shutil.copytree(bench.here / "cache", self.kept / "cache")

    def _stop_at(self, step: int, *flags: str) -> None:
        running = self.bench.start("train", *flags)
        while running.process.poll() is None and len(metrics_lines(self.bench.run)) < step:
            time.sleep(0.01)
        running.process.send_signal(signal.SIGTERM)
        done = running.wait()
        assert done.status == 0, done.log

    def _run(self, name: str, as_name: str = "") -> None:
        done = self.bench.finish(name)
        assert done.status == 0, done.log
        self.expected[as_name or name] = self.bench.result(name, done)

    def restore(self) -> None:
        """All files are as they were."""
        for kept in self.kept.iterdir():
            folder = (self.bench.here if kept.name == "cache" else self.bench.disk) / kept.name
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(kept, folder)


def run_case(bench: Bench, case: Case, sound: Sound, rng: random.Random) -> dict[str, Any]:
    """Do the harm, run the command, undo the harm, run it again."""
    sound.restore()
    if case.fresh:
        bench.clean(case.command)
    new = case.fresh and case.command == "train"
    if new:
        bench.write_config()
    expected = sound.expected["train, new" if new else case.command]
    undo = case.harm(bench, rng) if case.harm else lambda: None
    bench.file_kib = case.file_kib
    running = bench.start(case.command)
    bench.file_kib = 0
    after = case.later(bench, running) if case.later else lambda: None
    done = running.wait(120)
    try:
        word = verdict(bench, case, done, expected)
    except (OSError, ValueError) as e:  # status 0, but the result cannot be read
        word = f"FAULT: status 0, {type(e).__name__}"
    for back in (after, undo):
        back()
    again = bench.finish(case.command)
    try:
        have = bench.result(case.command, again) if again.status == 0 else None
        afterwards = "same" if have == expected else ""
        told = case.command == "train" and "told" in word and have
        if not afterwards and told and have | {"lines": expected["lines"]} == expected:
            afterwards = "same but for dropped lines"
    except (OSError, ValueError):
        afterwards = ""
    if new:
        bench.write_config(**CHANGED)
    row = {"case": case.name, "command": case.command, "status": done.status, "verdict": word}
    row |= {"afterwards": afterwards or f"FAULT: {again.status} {again.last_line}"}
    line = done.last_line.replace(str(bench.here), "").replace("|", "/")
    return row | {"last line": line, "log": done.log, "again": again.log}


def run(bench: Bench, rng: random.Random, only: str, log: Any) -> list[dict[str, Any]]:
    """All cases whose names contain one of `only`; rows of the table."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in ("soup_jax.training.loop", "soup_jax.specialists.compare", "tensorboardX"):
        importlib.import_module(name)
    bench.forks = True
    cases, rows = [*at_rest(), *live()], []
    with contextlib.ExitStack() as stack:
        try:
            mount("-t", "tmpfs", "-o", "size=64m", "none", bench.disk)
            stack.callback(subprocess.run, ["umount", "-l", bench.disk], check=False)
        except (OSError, subprocess.CalledProcessError):
            print("this user cannot mount: faults of a whole disk are left out\n")
            cases = [case for case in cases if not case.needs_disk]
        sound = Sound(bench)
        for case in cases:
            if any(x in case.name for x in only.split(",")):
                row = run_case(bench, case, sound, rng)
                log(row)
                rows.append({k: v for k, v in row.items() if k not in ("log", "again")})
    return rows
