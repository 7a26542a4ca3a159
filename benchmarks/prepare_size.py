"""Memory and time of `soup-jax prepare` by the size of the text.

    python benchmarks/prepare_size.py --sources=TEXT --mb=200,2000 [--config.num_domains=64 ...]

Makes text of each size by repeating the documents of the sources, each copy with a number before
it, so that none is an exact duplicate; runs the command on it; and samples, four times a second,
the memory of its processes: proportional set size, in which what they share counts once. Stages are
timed by the lines that the command prints. Needs Linux.
"""

import argparse
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from soup_jax.data import sources as corpus_lib
from soup_jax.data.damage import Report
from soup_jax.experiments import base

FILE_MB = 64


def write_text(folder: pathlib.Path, sources: list[str], num_bytes: int) -> None:
    """JSON lines of about so many bytes of text, in files of FILE_MB."""
    found, field = corpus_lib.find_files(sources, Report()), base.get_config().corpus.text_field

    def texts() -> Iterator[str]:
        for copy in itertools.count():
            for document in corpus_lib.read_documents(found, field, Report()):
                yield f"{copy} {document.text}"

    done, number, endless = 0, 0, texts()
    while done < num_bytes:
        end = min(done + FILE_MB * 1_000_000, num_bytes)
        with (folder / f"{number:04d}.jsonl").open("w", encoding="utf-8") as file:
            while done < end:
                text = next(endless)
                file.write(json.dumps({"text": text}) + "\n")
                done += len(text.encode())
        number += 1


def tree_of(pid: int) -> list[int]:
    """A process and those that it started, by number."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = pathlib.Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry))
    found = [pid]
    for number in found:
        found += children.get(number, [])
    return found


def memory(pid: int) -> int:
    """Bytes of proportional set size of a process and those that it started."""
    total = 0
    for number in tree_of(pid):
        try:
            text = pathlib.Path(f"/proc/{number}/smaps_rollup").read_text()
        except OSError:
            continue
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        total += int(found[1]) * 1024 if found else 0
    return total


def run(text: pathlib.Path, corpus: pathlib.Path, overrides: list[str]) -> None:
    """Prepare it, and print seconds and memory of each stage."""
    command = [sys.executable, "-m", "soup_jax.cli", "prepare", "--config=experiments/minipile.py"]
    command += [f"--config.corpus.sources={text}", f"--config.corpus.dir={corpus}", *overrides]
    begin = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    peaks: dict[str, int] = {}
    stages: list[tuple[str, float]] = [("start", begin)]

    def sample() -> None:
        while process.poll() is None:
            stage = stages[-1][0]
            peaks[stage] = max(peaks.get(stage, 0), memory(process.pid))
            time.sleep(0.25)

    threading.Thread(target=sample, daemon=True).start()
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("prepare: "):
            stages.append((line.removeprefix("prepare: ").strip()[:40], time.monotonic()))
    assert process.wait() == 0
    end = time.monotonic()
    size = sum(path.stat().st_size for path in text.iterdir()) / 1e6
    print(f"\n{size:,.0f} MB: {end - begin:.0f} s, peak {max(peaks.values()) / 1e6:,.0f} MB\n")
    print("| stage | s | MB/s | peak MB |\n| --- | --- | --- | --- |")
    for (name, at), (_, until) in zip(stages, [*stages[1:], ("", end)]):
        rate = size / max(until - at, 1e-3)
        print(f"| {name} | {until - at:.1f} | {rate:.1f} | {peaks.get(name, 0) / 1e6:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", required=True, help="files, folders or globs, with commas")
    parser.add_argument("--mb", default="200,2000")
    given, overrides = parser.parse_known_args()
    for size in map(int, given.mb.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            text = pathlib.Path(folder) / "text"
            text.mkdir()
            write_text(text, given.sources.split(","), size * 1_000_000)
            run(text, pathlib.Path(folder) / "corpus", overrides)
            shutil.rmtree(pathlib.Path(folder) / "corpus")


if __name__ == "__main__":
    main()
