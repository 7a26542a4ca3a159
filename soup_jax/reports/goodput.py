"""Where the time of a run went, and how it was started: from starts.jsonl, or from step times."""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from soup_jax.reports.curves import hours, tokens_per_step
from soup_jax.reports.groups import Group
from soup_jax.reports.runs import RunFiles

# What the phases of starts.jsonl are to a reader.
_KINDS = {
    "training": "training",
    "reading data": "waiting for data",
    "compiling": "compiling",
    "starting": "starting",
    "restoring": "starting",
    "saving": "saving",
    "evaluating": "evaluating",
    "compiling the evaluation": "evaluating",
}
KINDS = (*dict.fromkeys(_KINDS.values()), "slow lines")
_SLOW = 1.5  # times the median step time: a line with something else in it


def times(run: RunFiles) -> dict[str, Any]:
    """{"seconds": {KIND: SECONDS}, "goodput": share of training, "recorded": by starts.jsonl}.

    Without starts.jsonl only the time between lines is known, without evaluations and what came
    before the first step. Then "training" is what the steps take at their median, and "slow lines"
    what lines that took over half as much again had beside: compiling, saving, a busy machine.
    """
    if run.starts:
        seconds = dict.fromkeys(KINDS[:-1], 0.0)
        for start in run.starts:
            for phase, value in start["seconds"].items():
                seconds[_KINDS.get(phase, "starting")] += value
    else:
        seconds = _estimated(run.train)
    total = sum(seconds.values())
    return {
        "seconds": {kind: s for kind, s in seconds.items() if s > 0},
        "total": total,
        "goodput": seconds.get("training", 0.0) / total if total > 0 else None,
        "recorded": bool(run.starts),
    }


def _estimated(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = [
        (line.get("steps", 1), line["step_ms"] / 1e3, line.get("data_wait_ms", 0.0) / 1e3)
        for line in lines
        if isinstance(line.get("step_ms"), int | float) and math.isfinite(line["step_ms"])
    ]
    if not found:
        return {}
    usual = statistics.median(step for _, step, _ in found)
    wait = sum(steps * min(wait, step) for steps, step, wait in found)
    slow = sum(
        steps * max(step - max(usual, wait), 0.0)
        for steps, step, wait in found
        if step > _SLOW * usual
    )
    total = sum(steps * step for steps, step, _ in found)
    training = max(total - wait - slow, 0.0)
    return {"training": training, "waiting for data": wait, "slow lines": slow}


def runs(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A row for each run, with what started it."""
    rows = []
    for number, group in enumerate(groups):
        for run in group.runs:
            last = run.train[-1] if run.train else {}
            rows.append(
                {
                    "group": number,
                    "name": run.name,
                    "place": run.place,
                    "seed": run.config.get("seed"),
                    "step": run.step,
                    "num_steps": run.config.get("num_steps"),
                    "state": state(run),
                    "written": run.written,
                    "tokens": run.step * tokens_per_step(run),
                    "loss": last.get("loss"),
                    "tokens_per_second": _median(run, "tokens_per_second"),
                    "mfu": _median(run, "mfu"),
                    "hours": hours(run).get(run.step, 0.0),
                    "times": times(run),
                    "starts": [_start(start) for start in run.starts],
                    "changes": [_change(change) for change in run.changes],
                    "problems": run.problems,
                }
            )
    return rows


def state(run: RunFiles) -> str:
    """How far the run is, in a few words."""
    done = run.step >= run.config.get("num_steps", math.inf)
    end = run.starts[-1].get("end", "") if run.starts else None
    if done:
        return "done"
    if end == "":
        return "training, or killed"
    if run.nonfinite:
        return "stopped: not finite"
    if end:
        return "stopped" if str(end).startswith("Interrupted") else "ended by an error"
    return "not done; a line is being written, or was cut" if run.cut else "not done"


def _median(run: RunFiles, name: str) -> float | None:
    values = [v for line in run.train if isinstance(v := line.get(name), int | float)]
    return statistics.median(values) if values else None


def _start(start: Mapping[str, Any]) -> dict[str, Any]:
    words, versions = start.get("command"), start.get("versions")
    return {
        "command": shlex.join(map(str, words)) if isinstance(words, list) else "",
        "began": start["began"],
        "until": start["until"],
        "end": str(start.get("end", "")),
        "steps": [start.get("first_step"), start.get("step")],
        "devices": _devices(start.get("devices")),
        "versions": versions if isinstance(versions, Mapping) else {},
    }


def _devices(found: Any) -> str:
    if not isinstance(found, Mapping):
        return ""
    text = f"{found.get('count', '?')} x {found.get('kind', '?')}"
    processes = found.get("processes", 1)
    return text if processes == 1 else f"{text} in {processes} processes"


def _change(change: Mapping[str, Any]) -> str:
    old, new = change.get("old"), change.get("new")
    return f"from step {change['step']}: {change['field']}: {old!r} -> {new!r}"
