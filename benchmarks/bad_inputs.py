"""Runs bad input as processes: does each end in one sentence, how soon, and with how much memory?

    python benchmarks/bad_inputs.py --fields=200

Cases are all commands of tests/bad_input_test.py; a sample of its wrong values of config fields,
each in a config of its own that `train` gets; and source files made to fill the memory or the time,
each alone in a `prepare`. Each case is a process, forked from one that has imported the command
line alone. Printed is a line of JSON: cases; those that ended with a traceback, in silence (with
another status than 2, or without the sentence), or not within `--timeout` seconds; the largest peak
of resident memory in MB, the most seconds, and the cases that took them.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import bad_input_test as cases  # sets the environment of jax, too

CONFIG = """
from soup_jax.experiments import base

def get_config():
    cfg = base.get_config().unlock()
    with cfg.ignore_type():
        cfg.update_from_flattened_dict({fields!r})
    return cfg
"""
SMALL = {"num_domains": 4, "domain_weights.support_size": 2, "domain_weights.min_support_size": 1}
SMALL |= {"corpus.dir": "new", "corpus.num_workers": 1}


def _gzip(num_bytes: int) -> bytes:
    stream, piece = zlib.compressobj(9, wbits=31), b"a" * (1 << 20)
    return b"".join(stream.compress(piece) for _ in range(num_bytes >> 20)) + stream.flush()


def _line(piece: str) -> bytes:
    return f'{{"x": [{piece * ((31 << 20) // len(piece))}0]}}'.encode()


def _zstd(num_bytes: int) -> bytes:
    # A frame of blocks that repeat one letter: 4 bytes of it stand for 128 kB.
    block = (1 << 17 << 3 | 1 << 1).to_bytes(3, "little") + b"a"
    return b"\x28\xb5\x2f\xfd\x00\x50" + block * (num_bytes >> 17) + b"\x01\x00\x00"


def sources() -> dict[str, bytes]:
    """Name -> content of files that no corpus can be made of."""
    return {
        "letters.txt.gz": _gzip(1 << 30),
        "letters.txt.zst": _zstd(3 << 30),
        "line.jsonl.gz": _gzip(1 << 30),
        "line.jsonl.zst": _zstd(3 << 30),
        "objects.jsonl": _line("{},"),
        "keys.jsonl": _line('{"":0},'),
        "lists.jsonl": _line("[0],"),
        "strings.jsonl": _line('"ab",'),
        "deep.jsonl": b"[" * (31 << 20),
        "quotes.jsonl": b'"' * (31 << 20),
        "word.txt": b"a" * (31 << 20),
        "wide.txt": b"\xf0\x9f\x8d\x9e" * (7 << 20),
        "long.txt": b"a " * (20 << 20),
        "binary.txt": random.Random(0).randbytes(1 << 20),
        "utf16.jsonl": '{"text": "x"}\n'.encode("utf-16"),
        "empty.jsonl": b"",
        "cut.jsonl.gz": _gzip(1 << 20)[:-20],
        "no.parquet": b"PAR1" + b"\xff" * 4096 + b"PAR1",
    }


def commands(here: pathlib.Path, num_fields: int) -> list[tuple[str, list[str], str]]:
    """(case, arguments, what the sentence must say) of all cases; writes the files they read."""
    found = [(" ".join(arguments), arguments, says) for arguments, says in cases.COMMANDS]
    sample = random.Random(0).sample(cases.CASES, min(num_fields, len(cases.CASES)))
    wrong = {f"{name} = {value!r}": ("train", {name: value}, name) for name, value in sample}
    for name, data in sources().items():
        (here / name).write_bytes(data)
        wrong[f"prepare {name}"] = ("prepare", {**SMALL, "corpus.sources": (name,)}, "documents")
    for i, (case, (command, fields, says)) in enumerate(wrong.items()):
        # repr of a NaN or an infinity is no Python.
        text = re.sub(r"(?<=: )(-?)(nan|inf)\b", r"\1float('\2')", CONFIG.format(fields=fields))
        (here / f"case_{i}.py").write_text(text)
        arguments = [command, f"--config=case_{i}.py"]
        found.append((case, arguments + (["--workdir=w"] if command == "train" else []), says))
    return found


def run(arguments: list[str], here: pathlib.Path, timeout: float) -> tuple[int | None, int, str]:
    """(status, None if it had to be killed; peak memory in MB; output) of a command in `here`."""
    output = here / ".output"
    pid = os.fork()
    if not pid:
        os.setsid()
        os.chdir(here)
        sys.modules["fsspec"] = None  # as in the test: a user without drivers
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        try:
            status = cases.main.run(arguments)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    end = time.monotonic() + timeout
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            _, _, used = os.wait4(pid, 0)
            status = None
            break
        time.sleep(0.01)
    code = None if status is None else os.waitstatus_to_exitcode(status)
    return code, used.ru_maxrss // 1000, output.read_text(errors="replace")


def judge(status: int | None, output: str, says: str) -> str:
    if status is None:
        return "hangs"
    if "Traceback" in output:
        return "tracebacks"
    told = [x for x in output.splitlines() if x.startswith("soup-jax: error: ") and says in x]
    return "told" if status == 2 and told else "silent"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fields", type=int, default=200, help="wrong values of fields to try")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for a case")
    parser.add_argument("--all", action="store_true", help="print a line for each case")
    given = parser.parse_args()
    counts, slowest, largest = collections.Counter(), (0.0, ""), (0, "")
    with tempfile.TemporaryDirectory() as folder:
        here = cases.make_folder(pathlib.Path(folder))
        for case, arguments, says in commands(here, given.fields):
            begin = time.monotonic()
            status, megabytes, output = run(arguments, here, given.timeout)
            seconds, verdict = time.monotonic() - begin, judge(status, output, says)
            shutil.rmtree(here / "new", ignore_errors=True)
            if given.all or verdict != "told":
                line = {"case": case, "is": verdict, "status": status, "MB": megabytes}
                line |= {"seconds": round(seconds, 1), "output": output[-300:]}
                print(json.dumps(line), flush=True)
            counts[verdict] += 1
            slowest, largest = max(slowest, (seconds, case)), max(largest, (megabytes, case))
    names = ("tracebacks", "silent", "hangs")
    result = {"cases": counts.total()} | {name: counts[name] for name in names}
    result |= {"peak MB": largest[0], "of": largest[1]}
    print(json.dumps(result | {"most seconds": round(slowest[0], 1), "by": slowest[1]}))


if __name__ == "__main__":
    main()
