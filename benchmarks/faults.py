"""Injects faults into the commands, runs them again, and compares what comes of it.

    python benchmarks/faults.py kills --number=108 --seed=0
    python benchmarks/faults.py processes --number=20 --seed=0
    python benchmarks/faults.py storage --seed=0

`kills` shares the number out to all commands. Each is started, killed by SIGKILL at a random
moment and started again until it ends, and its result is compared with that of an undisturbed run:
artefacts by hash, printed text, checkpoints by their checksums, metrics line by line but for times.
Every eighth kill of train is followed by one by SIGTERM, which is not counted in the number. Train
is killed half of the times at any moment of its life and half of the times at a random step;
every third time it goes on on another number of devices, where batches must be the same and losses
nearly so. generate, score, verify, plan and serve must change no file. A server is asked for a
specialist, a completion and a download, and about half of its kills come while it makes the last;
its result is what it answers.

`processes` does the same to four processes that train together: one of them is killed, or all, and
the others must end by themselves with a reason. `storage` is described in `fault_storage.py`.

A line of JSON for each fault goes to --log, and a table in Markdown to stdout.
"""

import argparse
import collections
import glob
import json
import pathlib
import random
import signal
import socket
import statistics
import tempfile
import time
from typing import Any

import fault_storage
from fault_cases import (
    NUM_STEPS,
    SAVE_EVERY,
    Bench,
    Done,
    compare_runs,
    metrics_lines,
)

SHARES = {
    "prepare": 14,
    "train": 34,
    "evaluate": 8,
    "instantiate": 8,
    "many": 8,  # instantiate --recipe
    "pack": 8,
    "finetune": 6,
    "export": 4,
    "generate": 3,
    "score": 3,
    "verify": 2,
    "plan": 2,
    "serve": 8,
}
DEVICES = (1, 2, 4)
# Of a loss in nats, on another mesh: that of tests/topology_test.py.
LOSS_BOUND = 5e-5
ENDS_WITHIN = 60.0  # seconds in which the others of a killed process must have ended


def shares(number: int) -> dict[str, int]:
    """`number` kills as SHARES divides them, at least one of each; train gets the rest."""
    total = sum(SHARES.values())
    counts = {name: max(1, number * share // total) for name, share in SHARES.items()}
    counts["train"] += number - sum(counts.values())
    return counts


def undisturbed(bench: Bench, name: str, **how: Any) -> tuple[Done, Any]:
    """The command without a fault, and its result."""
    bench.clean(name)
    done = bench.finish(name, **how)
    assert done.status == 0, f"{name} does not run undisturbed:\n{done.log}"
    return done, bench.result(name, done)


def kill(
    bench: Bench,
    name: str,
    rng: random.Random,
    usual: Done,
    *,
    number: signal.Signals = signal.SIGKILL,
    in_training: bool = False,
    devices: int = 1,
) -> Done:
    """Start the command and kill it at a random moment, or at a random step of its training."""
    for _ in range(10):  # again if it has ended before
        bench.clean(name)
        running = bench.start(name, devices=devices)
        if in_training:
            running.await_step(rng.randrange(1, NUM_STEPS))
            time.sleep(rng.random() * 0.1)  # about a step and its share of a save
        elif name == "serve" and rng.random() < 0.5:
            while running.process.poll() is None and not glob.glob(f"{bench.temporary}/.*/*.zip"):
                time.sleep(0.001)
        else:
            time.sleep(rng.random() * usual.seconds)
        if running.process.poll() is None:
            break
        running.wait()
    running.process.send_signal(number)
    return running.wait(60)


def disturb(bench: Bench, name: str, kills: int, rng: random.Random, log: Any) -> dict[str, Any]:
    """Kill a command other than train; what came of that."""
    undisturbed(bench, name)  # compiles
    usual, expected = undisturbed(bench, name)
    rows = []
    for number in range(kills):
        before = bench.contents()
        killed = kill(bench, name, rng, usual)
        left = sorted(bench.leftovers())
        changed = name not in bench.writes and bench.contents() != before
        done = bench.finish(name)
        row = {"command": name, "number": number, "killed": killed.status, "left by it": left}
        row["status"] = done.status
        row["differs"] = done.status == 0 and bench.result(name, done) != expected
        row |= {"changed": changed, "left": sorted(bench.leftovers()), "seconds": done.seconds}
        rows.append(row)
        log(row)
    return summary(name, rows, usual)


def disturb_train(
    bench: Bench, command: str, kills: int, rng: random.Random, log: Any
) -> dict[str, Any]:
    """Kill train, and continue it on as many devices or on others."""
    undisturbed(bench, command)  # compiles
    whole = {devices: undisturbed(bench, command, devices=devices) for devices in DEVICES}
    apart = [compare_runs(whole[1][1], whole[n][1], bits=False) for n in DEVICES]
    log({"loss difference of undisturbed runs on 1 and on 2 and 4 devices": apart[1:]})
    rows = []
    terms = [signal.SIGKILL] * kills + [signal.SIGTERM] * (kills // 8)
    for number, name in enumerate(terms):
        first = rng.choice(DEVICES)
        second = rng.choice([n for n in DEVICES if n != first]) if number % 3 == 2 else first
        killed = kill(
            bench,
            command,
            rng,
            whole[1][0],
            number=name,
            in_training=number % 2 == 1,
            devices=first,
        )
        logged = max((v["step"] for v in metrics_lines(bench.run)), default=0)
        done = bench.finish(command, devices=second)
        row = {"command": command, "number": number, "signal": name.name}
        row["killed"] = killed.status
        row |= {"devices": (first, second), "status": done.status, "seconds": done.seconds}
        row |= {"step at kill": logged, "lost": lost(logged, done), "training": done.first_step}
        if done.status == 0:
            have = bench.result(command, done)
            row["apart"] = compare_runs(have, whole[first][1], bits=first == second)
            row["differs"] = row["apart"] > (0 if first == second else LOSS_BOUND)
        row["left"] = sorted(bench.leftovers())
        rows.append(row)
        log(row)
    return summary(command, rows, whole[1][0])


def lost(logged: int, done: Done) -> int | None:
    """Steps that were logged before the kill and done again."""
    found = [x for x in done.log.splitlines() if "starting at step " in x]
    return logged - int(found[0].rpartition(" ")[2]) if found else None


def median(values: Any) -> str:
    found = [v for v in values if v is not None]
    return f"{statistics.median(found):.1f}" if found else "-"


def summary(name: str, rows: list[dict[str, Any]], usual: Done) -> dict[str, Any]:
    """A row of the table; details are in the log."""
    steps = [r["lost"] for r in rows if r.get("lost") is not None and r["signal"] == "SIGKILL"]
    kinds = collections.Counter(r.get("signal", "SIGKILL") for r in rows)
    return {
        "command": name,
        "kills": " + ".join(f"{n} {kind}" for kind, n in kinds.items()),
        "ended before": sum(r["killed"] == 0 and r.get("signal") != "SIGTERM" for r in rows),
        "status not 0": sum(r["status"] != 0 for r in rows),
        "results differ": sum(bool(r.get("differs")) for r in rows),
        "files changed": sum(bool(r.get("changed")) for r in rows),
        "left behind": ", ".join(sorted({x for r in rows for x in r["left"]})) or "nothing",
        "steps lost, most": max(steps) if steps else "-",
        "training again (s)": median(r.get("training") for r in rows),
        "at the end (s)": median(r["seconds"] for r in rows),
        "undisturbed (s)": f"{usual.seconds:.1f}",
    }


def run_kills(bench: Bench, number: int, seed: int, only: str, log: Any) -> list[dict[str, Any]]:
    """Kill the commands of `only`; the others are run where they are needed."""
    table = []
    for name, count in shares(number).items():
        rng = random.Random(f"{seed} {name}")
        if name in only:
            part = disturb_train if name == "train" else disturb
            table.append(part(bench, name, count, rng, log))
            log(table[-1])
        if name in ("prepare", "train", "instantiate"):  # the commands that follow need it
            bench.clean(name)
            assert bench.finish(name).status == 0
    return table


def start_together(bench: Bench, processes: int, devices: int) -> list[Any]:
    """Train as so many processes of so many devices each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    if processes == 1:
        return [bench.start("train", devices=devices)]
    place = {"SOUP_JAX_COORDINATOR": f"127.0.0.1:{port}", "SOUP_JAX_NUM_PROCESSES": str(processes)}
    return [
        bench.start("train", devices=devices, SOUP_JAX_PROCESS_ID=str(i), **place)
        for i in range(processes)
    ]


def run_processes(bench: Bench, number: int, rng: random.Random, log: Any) -> list[dict[str, Any]]:
    assert bench.finish("prepare").status == 0
    for _ in range(2):
        bench.clean("train")
        together = [r.wait() for r in start_together(bench, 4, 1)]
        assert [d.status for d in together] == [0] * 4, "\n".join(d.log for d in together)
    usual, expected = together[0], bench.result("train", together[0])
    rows = []
    for n in range(number):
        bench.clean("train")
        again = (4, 1) if n % 2 == 0 else rng.choice([(2, 2), (2, 1), (1, 4), (1, 1), (4, 2)])
        rows.append(kill_one(bench, n, again, usual, expected, rng))
        log(rows[-1])
    return [together_row(rows, usual, same) for same in (True, False)]


def kill_one(
    bench: Bench, n: int, again: tuple[int, int], usual: Done, expected: Any, rng: random.Random
) -> dict[str, Any]:
    """Kill one of four processes (every fifth time process 0, every seventh all), and go on."""
    victims = list(range(4)) if n % 7 == 6 else [0] if n % 5 == 0 else [rng.randrange(4)]
    running = start_together(bench, 4, 1)
    if n % 4:
        running[0].await_step(rng.randrange(1, NUM_STEPS))
        time.sleep(rng.random() * 0.1)
    else:  # while they start, too
        time.sleep(rng.random() * usual.seconds)
    for i in victims:
        running[i].process.kill()
    killed = time.monotonic()
    done = [r.wait(ENDS_WITHIN) for r in running]
    rest = [d for i, d in enumerate(done) if i not in victims]
    logged = max((v["step"] for v in metrics_lines(bench.run)), default=0)
    row = {"number": n, "victims": victims, "step at kill": logged, "again": again}
    row["others"] = [d.status for d in rest]
    row["reasons"] = sorted({d.last_line for d in rest})
    row["seconds to end"] = time.monotonic() - killed
    row["no reason"] = sum(d.status != 0 and "soup-jax: error: " not in d.log for d in rest)
    row["tracebacks"] = sum("Traceback" in d.log for d in rest)
    finished = [r.wait() for r in start_together(bench, *again)]
    row |= {"status": [d.status for d in finished], "seconds": finished[0].seconds}
    row |= {"lost": lost(logged, finished[0]), "training": finished[0].first_step}
    row["left"] = sorted(bench.leftovers())
    if set(row["status"]) == {0}:
        row["apart"] = compare_runs(
            bench.result("train", finished[0]), expected, bits=again == (4, 1)
        )
    return row


def together_row(rows: list[dict[str, Any]], usual: Done, same: bool) -> dict[str, Any]:
    rows = [r for r in rows if (tuple(r["again"]) == (4, 1)) == same]
    bound = 0.0 if same else LOSS_BOUND
    return {
        "restarted on": "4 processes, 1 device each" if same else "others",
        "kills": len(rows),
        "others that hung": sum(r["others"].count(None) for r in rows),
        "ended without a reason": sum(r["no reason"] for r in rows),
        "with a traceback": sum(r["tracebacks"] for r in rows),
        "others' end (s), most": f"{max((r['seconds to end'] for r in rows), default=0):.1f}",
        "restarts not 0": sum(set(r["status"]) != {0} for r in rows),
        "results differ": sum(r.get("apart", 0.0) > bound for r in rows),
        "largest difference of a loss": max((r.get("apart", 0.0) for r in rows), default=0.0),
        "left behind": ", ".join(sorted({x for r in rows for x in r["left"]})) or "nothing",
        "steps lost, most": max((r["lost"] or 0 for r in rows), default=0),
        "training again (s)": median(r["training"] for r in rows),
        "at the end (s)": median(r["seconds"] for r in rows),
        "undisturbed (s)": f"{usual.seconds:.1f}",
    }


def markdown(table: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in ([*table[0]], ["---"] * len(table[0]))]
    lines += ["| " + " | ".join(str(x) for x in row.values()) + " |" for row in table]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["kills", "processes", "storage"])
    parser.add_argument("--number", type=int, default=20, help="of kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="commands, or part of a case's name")
    parser.add_argument("--log", type=pathlib.Path, default=pathlib.Path("faults.jsonl"))
    given = parser.parse_args()
    rng = random.Random(given.seed)

    def log(row: dict[str, Any]) -> None:
        with given.log.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    log({"part": given.part, "number": given.number, "seed": given.seed})
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pathlib.Path(folder), "disk" if given.part == "storage" else ".")
        if given.part == "kills":
            table = run_kills(
                bench,
                given.number,
                given.seed,
                given.only.split(",") if given.only else list(SHARES),
                log,
            )
        elif given.part == "processes":
            table = run_processes(bench, given.number, rng, log)
        else:
            table = fault_storage.run(bench, rng, given.only, log)
    print(f"seed {given.seed}, {NUM_STEPS} steps, a save every {SAVE_EVERY}\n")
    print(markdown(table))


if __name__ == "__main__":
    main()
