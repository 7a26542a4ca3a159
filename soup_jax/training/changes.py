"""What a started run changes in its config: refused, or accepted and recorded with the step.

A run's `changes.jsonl` has a line {"step", "time", "field", "old", "new"} for every change of a
tunable field, and for the run that its first parameters came from. The new value holds from that
step on. config.json holds the newest values.
"""

import json
import logging
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from soup_jax.config import schema as config_lib
from soup_jax.data.sampling import plan_index
from soup_jax.errors import UserError
from soup_jax.inputs import check_structure, open_file
from soup_jax.storage import write_text
from soup_jax.training.workdir import Workdir

_log = logging.getLogger(__name__)

_LINE = {"step": int, "field": str}

Changes = Mapping[str, tuple[Any, Any]]  # field -> (old, new)


def compare(home: Workdir, cfg: ConfigDict, *, accept: bool) -> Changes:
    """The tunable fields in which `cfg` differs from the run there; none for a new run.

    Raises:
      UserError: fixed fields differ, or tunable ones and `accept` is False; each is listed.
    """
    path = home.path / "config.json"
    if not path.exists():
        return {}
    old = config_lib.load(path)
    fixed = config_lib.diff(old, cfg, "fixed")
    tunable = config_lib.diff(old, cfg, "tunable")
    if not fixed and (accept or not tunable):
        return tunable
    kinds = (("never in a started run", fixed), ("with --accept_changes", tunable))
    lines = [
        f"{name}: {before!r} -> {now!r} ({allowed})"
        for allowed, changes in kinds
        for name, (before, now) in changes.items()
    ]
    advice = "Use the old values to continue it, or another --workdir"
    if fixed:
        advice += (
            f" (with --config.checkpoint.init_from={home.place} a new run starts from its end)"
        )
    else:
        advice += ", or --accept_changes to go on with the new ones"
    raise UserError(
        f"{home.place} holds a run with another config (old -> new):\n  "
        + "\n  ".join(lines)
        + f"\n{advice}"
    )


def check(changes: Changes, *, start: int) -> None:
    """Refuse changes of what a run has done before its step `start`.

    Raises:
      UserError: num_steps below `start`, or other batches left out of the steps before.
    """
    _, num_steps = changes.get("num_steps", (0, start))
    if num_steps < start:
        raise UserError(
            f"num_steps = {num_steps}, but the run has done {start} steps: set "
            f"--config.num_steps={start} to end it here"
        )
    old, new = changes.get("skip_batches", ((), ()))
    done = plan_index(start - 1, old) + 1 if start else 0
    if _below(old, done) != _below(new, done):
        raise UserError(
            f"skip_batches: {old!r} -> {new!r} changes batches that the run has trained on: leave "
            f"out steps of the plan from {done} on, or start a new run from an earlier checkpoint "
            "(--config.checkpoint.init_from, init_step)"
        )


def _below(skip: Sequence[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    return [(first, min(last, end - 1)) for first, last in skip if first < end]


def record(workdir: pathlib.Path, changes: Changes, *, start: int) -> None:
    """Add `changes`, which hold from step `start` on, to the run's changes.jsonl.

    Those of later steps, which a start from an earlier checkpoint undid, hold from `start` on too.

    Raises:
      UserError: there is a changes.jsonl that cannot be read.
    """
    path = workdir / "changes.jsonl"
    if not changes and not path.exists():
        return
    lines, damaged = _read(path)
    lines = [line | {"step": min(line["step"], start)} for line in lines]
    # A start that was killed before its first save is repeated.
    lines = [line for line in lines if line["step"] < start or line["field"] not in changes]
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for field, (old, new) in changes.items():
        _log.info("from step %d on: %s: %r -> %r", start, field, old, new)
        lines.append({"step": start, "time": now, "field": field, "old": old, "new": new})
    text = [*damaged, *(json.dumps(line) for line in lines)]
    write_text(path, "".join(line + "\n" for line in text))


def _read(path: pathlib.Path) -> tuple[list[dict[str, Any]], list[str]]:
    # (sound lines, others): a record for people, which no number depends on. What cannot be read
    # stops no run, and stays for them to look at.
    lines: list[dict[str, Any]] = []
    damaged: list[str] = []
    if not path.exists():
        return lines, damaged
    with open_file(path) as f:
        text = f.read().decode("utf-8", "backslashreplace")
    for line in text.splitlines():
        try:
            value = json.loads(line)
            check_structure(value, _LINE, path)
            lines.append(value)
        except (ValueError, RecursionError):  # UserError is one
            _log.warning("%s: a damaged line is kept as it is: %.80s", path, line)
            damaged.append(line)
    return lines, damaged
