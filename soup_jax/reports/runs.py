"""Which folders are runs, and what one has left: its files, read without opening its parameters.

A report is wanted most of a run in which something is wrong. So what is missing or damaged is noted
in `RunFiles.problems`, and the rest is read.
"""

import dataclasses
import datetime
import glob
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from soup_jax import inputs, places, remote
from soup_jax import storage as files
from soup_jax.config import schema as config_lib
from soup_jax.errors import UserError
from soup_jax.training import metrics

# Of a run's folder, what is never looked through for further runs.
_INSIDE = ("checkpoints", "tensorboard", "domains")
_DOMAINS = [{"label": str, "windows": {"train": int}}]
_RESULT = {"specialists": {...: dict}, "average": {...: dict}, "runs?": {...: dict}}
_START = {"began": str, "until": str, "seconds": {...: float}}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """A result of `soup-jax evaluate`, or of the newest evaluation during training.

    Attributes:
      source: the file, in words.
      part: of the specialists' documents, as `sets.PARTS`.
      step: of the parameters; None: not known.
      result: as `evaluator.evaluate` returns it.
    """

    source: str
    part: str
    step: int | None
    result: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RunFiles:
    """What a run's folder holds.

    Attributes:
      place: the folder, as the user names it.
      config: every field by its dotted name.
      train: the sound lines of metrics.jsonl of that kind, by step.
      evaluations: those of kind "evaluation".
      num_damaged: other lines, but for one at the end that is not whole.
      cut: whether there is such a line: it is being written, or its writer was killed.
      evaluation: the newest result that was used for no choice, or the next best.
      starts: the lines of starts.jsonl.
      changes: those of changes.jsonl.
      domains: the entries of domains.json.
      fingerprint: of the corpus.
      written: when metrics.jsonl was written last, in UTC.
      nonfinite: the files on steps whose loss or gradient was not finite.
      problems: sentences on what is missing or damaged.
    """

    place: str
    config: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    num_damaged: int
    cut: bool
    evaluation: Evaluation | None
    starts: list[dict[str, Any]]
    changes: list[dict[str, Any]]
    domains: list[dict[str, Any]]
    fingerprint: str
    written: str
    nonfinite: list[str]
    problems: list[str]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return remote.spelled(self.place).rstrip("/").rpartition("/")[2] or self.place

    @property
    def step(self) -> int:
        """The last that a line tells of; 0 without lines."""
        return self.train[-1]["step"] if self.train else 0


def find(patterns: Sequence[str]) -> list[str]:
    """The run folders that paths, addresses or globs mean, each once: themselves, or below them.

    Raises:
      UserError: one of the patterns means none.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        for place in _meant(pattern):
            found.setdefault(place if remote.is_object(place) else os.path.realpath(place), place)
    return list(found.values())


def _meant(pattern: str) -> list[str]:
    if remote.is_object(pattern):
        return [remote.spelled(pattern).rstrip("/")]
    files.refuse_address(pattern, objects=True)
    try:
        matches = [pattern] if os.path.lexists(pattern) else glob.glob(pattern)
    except ValueError:  # a zero byte
        matches = []
    runs = [run for match in sorted(matches, key=_natural) for run in _below(match)]
    if runs:
        return runs
    if not matches:
        raise UserError(f"{pattern} does not exist: give the folder of a run, or one above runs")
    if len(matches) > 1:
        raise UserError(f"none of the {len(matches)} places {pattern} is a run, or holds one")
    if not os.path.isdir(matches[0]):
        raise UserError(f"{matches[0]} is a file: give the folder of a run, or one above runs")
    raise UserError(
        f"{matches[0]} is not a run, and none lies below it: a run has config.json, and "
        "metrics.jsonl or parameters.txt (see `soup-jax train`)"
    )


def _natural(name: str) -> list[Any]:
    # run-9 before run-10, rate=0.003 before rate=0.01 and 1e-2 before 1e30
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", name)
    return [(0, float(p), "") if i % 2 else (1, 0.0, p) for i, p in enumerate(parts)]


def _is_run(names: Sequence[str]) -> bool:
    known = "metrics.jsonl" in names or "parameters.txt" in names
    return "config.json" in names and known and "soup.json" not in names


def _below(top: str) -> Iterator[str]:
    for folder, folders, names in os.walk(top):
        if _is_run(names):
            folders.clear()
            yield folder
        folders[:] = [f for f in folders if f not in _INSIDE and not f.startswith(".")]
        folders.sort(key=_natural)


def read(place: str) -> RunFiles:
    """Read what a run's folder holds.

    Raises:
      UserError: it is no run, or cannot be read.
    """
    folder, problems = places.local(place), list[str]()
    config = _config(folder, problems)
    lines, num_damaged, cut = metrics.read_all(folder / "metrics.jsonl")
    kinds: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "evaluation": {}}
    for line in lines:
        kinds.setdefault(line["kind"], {})[line["step"]] = line
    train, evaluations = (
        [line for _, line in sorted(kinds[kind].items())] for kind in ("train", "evaluation")
    )
    if not lines:
        problems.append("metrics.jsonl has no line yet")
    if num_damaged:
        problems.append(f"{num_damaged} damaged lines of metrics.jsonl are left out")
    nonfinite = sorted((p.name for p in folder.glob("nonfinite_*.json")), key=_natural)
    problems += [f"a loss or gradient was not finite: see {name}" for name in nonfinite]
    domains, fingerprint = _domains(folder, config, problems)
    return RunFiles(
        place=remote.spelled(place),
        config=config,
        train=train,
        evaluations=evaluations,
        num_damaged=num_damaged,
        cut=cut,
        evaluation=_evaluation(folder, evaluations, problems),
        starts=_json_lines(folder / "starts.jsonl", _START, problems),
        changes=_json_lines(folder / "changes.jsonl", {"step": int, "field": str}, problems),
        domains=domains,
        fingerprint=fingerprint,
        written=_written(folder / "metrics.jsonl"),
        nonfinite=nonfinite,
        problems=problems,
    )


def _config(folder: pathlib.Path, problems: list[str]) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is not a run: it has no config.json (see `soup-jax train`)")
    try:
        return dict(config_lib.flat_items(config_lib.load(path)))
    except UserError as e:
        # Of a later version, perhaps; what it says can still be shown.
        found = inputs.read_json(path)
        if not isinstance(found, dict):
            raise
        problems.append(f"{e}. Its fields are shown as they are")
        items = config_lib.flat_items(found)
        return {name: value for name, value in items if name not in ("format", "seal")}


def _written(path: pathlib.Path) -> str:
    if not path.exists():
        return ""
    when = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def _evaluation(
    folder: pathlib.Path, lines: Sequence[dict[str, Any]], problems: list[str]
) -> Evaluation | None:
    for name, part in (("evaluation.json", "final"), ("evaluation_tuning.json", "tuning")):
        if not (folder / name).exists():
            continue
        try:
            found = inputs.read_json(folder / name, _RESULT)
        except UserError as e:
            problems.append(str(e))
            continue
        step = found.get("runs", {}).get("specialist", {}).get("step")
        part = found.get("part", part)
        return Evaluation(source=name, part=part, step=step, result=found)
    for line in reversed(lines):
        if line.get("specialists") and isinstance(line.get("average"), dict):
            source = "metrics.jsonl, the newest evaluation during training"
            return Evaluation(source=source, part="tuning", step=line["step"], result=line)
    return None


def _json_lines(path: pathlib.Path, like: Any, problems: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found
    with inputs.open_file(path) as f:
        text = f.read(inputs.MAX_TEXT_BYTES).decode("utf-8", "replace")
    damaged = 0
    for line in text.splitlines():
        try:
            value = json.loads(line)
            inputs.check_structure(value, like, path)
            found.append(value)
        except (ValueError, RecursionError):  # UserError is one
            damaged += 1
    if damaged:
        problems.append(f"{damaged} damaged lines of {path.name} are left out")
    return found


def _domains(
    folder: pathlib.Path, config: Mapping[str, Any], problems: list[str]
) -> tuple[list[dict[str, Any]], str]:
    # A run of the first version has no copy: its corpus may still be there.
    for home in (folder / "domains", pathlib.Path(str(config.get("corpus.dir", "")))):
        if not (home / "domains.json").exists():
            continue
        try:
            domains = inputs.read_json(home / "domains.json", _DOMAINS)
            about = home / ("map.json" if (home / "map.json").exists() else "manifest.json")
            fingerprint = inputs.read_json(about).get("fingerprint", "")
        except (UserError, AttributeError) as e:
            problems.append(str(e))
            continue
        if len(domains) == config.get("num_domains"):
            return domains, str(fingerprint)
    problems.append("the domains are not known: neither the run nor its corpus has them")
    return [], ""
