"""The numbers of a run: what a line of metrics.jsonl says, and who writes it.

Only process 0 writes, and it gives the numbers to `trackers` too.
"""

import hashlib
import json
import pathlib
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from soup_jax.hardware import chips
from soup_jax.inputs import check_structure, open_file
from soup_jax.storage import write_text
from soup_jax.training.trackers import Trackers


def peak_tflops(device_kind: str) -> float:
    """Dense bfloat16 peak of a known device in TFLOP/s; 0 if it is not known (CPUs)."""
    chip = chips.from_kind(device_kind)
    return chip.peak_tflops if chip else 0.0


_LINE = {"step": int, "kind": str}


class BatchHash:
    """Hash of the records of the steps since the last line: equal for any number of processes."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, domain_B: np.ndarray, window_B: np.ndarray) -> None:
        """Add one step's records, as the sampling plan names them."""
        self._digest.update(np.stack([domain_B, window_B]).astype("<i8").tobytes())

    def hex(self) -> str:
        """Sixteen hex digits."""
        return self._digest.hexdigest()[:16]


def summarize(sums: Mapping[str, Any], *, seconds: float, wait_seconds: float) -> dict[str, Any]:
    """One log line from the sums of `step.train_step` over the steps since the last one.

    Losses are nats per target, weighted by targets; `domains` maps a domain's number to
    [windows, mean loss].
    """
    sums = {name: np.asarray(value) for name, value in sums.items()}
    steps = max(float(sums["steps"]), 1.0)
    means = ["learning_rate", "grad_norm", "shared_norm", "bank_norm", "router_norm"]
    means += ["effective_rate", "alpha_l1", "alpha_l2", "alpha_spread"]
    line: dict[str, Any] = {name: float(sums[name]) / steps for name in means}
    line["steps"] = int(steps)  # averaged here; fewer than usual after a stop between two lines
    line["loss"] = float(sums["domain_loss"].sum() / max(sums["domain_targets"].sum(), 1.0))
    line["grad_norm_max"] = float(sums["grad_norm_max"])
    line["step_ms"] = 1e3 * seconds / steps
    line["data_wait_ms"] = 1e3 * wait_seconds / steps
    line["tokens_per_second"] = float(sums["targets"]) / seconds
    rows, loss, targets = (sums[f"domain_{n}"] for n in ("rows", "loss", "targets"))
    line["domains"] = {
        str(k): [int(rows[k]), round(float(loss[k] / max(targets[k], 1.0)), 4)]
        for k in np.flatnonzero(rows)
    }
    return line


class MetricsWriter:
    """Appends to `<workdir>/metrics.jsonl`, and gives the numbers to the trackers of the config."""

    def __init__(self, cfg: ConfigDict, *, workdir: pathlib.Path, start_step: int, active: bool):
        """On resume, lines after `start_step` (of steps that a kill undid) are dropped first."""
        self._file = None
        self._kept: set[tuple[int, str]] = set()
        if not active:
            return
        path = workdir / "metrics.jsonl"
        kept = [v for v in _read_lines(path) if v["step"] <= start_step]
        self._kept = {(v["step"], v["kind"]) for v in kept}
        write_text(path, "".join(_as_line(v) for v in kept))
        self._file = path.open("a", encoding="utf-8")
        self._trackers = Trackers(cfg, workdir=workdir, start_step=start_step)

    def write(self, step: int, values: Mapping[str, Any], *, kind: str = "train") -> None:
        """One JSON line {"step", "kind", ...}; its numbers also go to the trackers."""
        if self._file is None:
            return
        self._file.write(_as_line({"step": step, "kind": kind, **values}))
        self._file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if numbers:
            self._trackers.log(step, numbers, kind)

    def has(self, step: int, kind: str) -> bool:
        """Whether a line of that kind and step was kept from before."""
        return (step, kind) in self._kept

    def close(self) -> None:
        """Flush and close all files."""
        if self._file is not None:
            self._file.close()
            self._trackers.close()


def _as_line(value: Mapping[str, Any]) -> str:
    return json.dumps({**value, "crc32": _crc32(value)}) + "\n"


def _crc32(value: Mapping[str, Any]) -> int:
    # Of the text without it; Python reads back the numbers that it writes.
    return zlib.crc32(json.dumps(value).encode())


def count_lines(path: pathlib.Path) -> tuple[int, int]:
    """(sound lines, lines) of a metrics.jsonl; (0, 0) without one."""
    if not path.exists():
        return 0, 0
    with open_file(path) as f:
        return len(_read_lines(path)), sum(1 for _ in f)


def read_all(path: pathlib.Path) -> tuple[list[dict[str, Any]], int, bool]:
    """(sound lines of all kinds, number of damaged ones, whether the last is not whole): a line at
    the end without its end is being written, or was cut by a kill, and counts as no damage."""
    lines: list[dict[str, Any]] = []
    num_damaged, cut = 0, False
    if path.exists():
        with open_file(path) as f:
            for data in f:
                value = _sound(data, path)
                if value is not None:
                    lines.append(value)
                elif data.endswith(b"\n"):
                    num_damaged += 1
                else:
                    cut = True
    return lines, num_damaged, cut


def _sound(data: bytes, path: pathlib.Path) -> dict[str, Any] | None:
    try:
        # A crash may leave any bytes, and half a line.
        value: Any = json.loads(data) if data.endswith(b"\n") else None
        check_structure(value, _LINE, path)
        expected = value.pop("crc32", None)  # earlier versions wrote none
        return value if expected in (None, _crc32(value)) else None
    except (ValueError, RecursionError):  # UserError is one
        return None


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    lines, num_damaged, cut = read_all(path)
    for _ in range(num_damaged + cut):
        print(f"{path}: dropped a damaged line", file=sys.stderr)
    return lines


def read_metrics(path: pathlib.Path, *, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind, in order; a damaged one is left out with a message."""
    return [v for v in _read_lines(path) if v["kind"] == kind]
