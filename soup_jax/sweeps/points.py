"""The points of a sweep: what each changes, what its folder is called, and the file of them all.

A point is the base config with a few fields set. The fields come from axes, whose product is taken,
or from a list of overrides that an experiment file returns, or from both.

    SWEEP/sweep.json      the points, and the command that made them
    SWEEP/NAME/           a point: the folder of an ordinary run, and
    SWEEP/NAME/log.txt        what its process printed
    SWEEP/NAME/outcome.json   how it ended, once it has
"""

import ast
import dataclasses
import itertools
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from soup_jax import inputs
from soup_jax import storage as files
from soup_jax.config import schema as config_lib
from soup_jax.config.fields import nearest
from soup_jax.errors import UserError

FORMAT = 1
MAX_POINTS = 10_000
_MAX_NAME = 120  # characters; a file system allows 255 bytes
_SWEEP = {
    "format": int,
    "command": [str],
    "train": [str],
    "points": [{"name": str, "overrides": {}}],
    "earlier": [str],
    "scoring?": {},
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: of its folder, made of the overrides alone.
      overrides: field -> value, of the field's type.
    """

    name: str
    overrides: dict[str, Any]

    @property
    def arguments(self) -> list[str]:
        """The overrides as `soup-jax train` takes them."""
        return [argument(name, value) for name, value in self.overrides.items()]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What sweep.json says.

    Attributes:
      command: the last one that was given.
      train: --config and the overrides that all points share.
      points: of that command, in its order.
      earlier: names of points of earlier commands, whose folders are left alone.
      scoring: name of a point -> `work.scoring` of its config; older sweeps have none.
    """

    command: list[str]
    train: list[str]
    points: list[Point]
    earlier: list[str]
    scoring: dict[str, str] = dataclasses.field(default_factory=dict)


def argument(name: str, value: Any) -> str:
    """A field's value as a flag of the command line, which gives the same value."""
    return f"--config.{name}={spelled(value)}"


def spelled(value: Any) -> str:
    """A value in text, as the flags of fields take it."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def axis(name: str, text: str) -> list[Any]:
    """The values of `--sweep.NAME=TEXT`.

    Text with commas, as Python writes them; strings need no quotes unless they hold a comma.

    Raises:
      UserError: no such field, or text that is no list of its values.
    """
    if name not in config_lib.FIELDS:
        raise UserError(f"--sweep.{name}: unknown field {name}{nearest(name, config_lib.FIELDS)}")
    field = config_lib.FIELDS[name]
    words = [word.strip() for word in text.split(",")]
    try:
        found: Any = ast.literal_eval(f"[{text}]")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        found = None
    if isinstance(field.default, bool):
        known = {"true": True, "false": False}
        found = [known.get(word.lower(), word) for word in words]
    elif isinstance(field.default, str) and not _all_strings(found):
        found = words
    if not isinstance(found, list) or not found:
        kind = type(field.default).__name__
        raise UserError(
            f"--sweep.{name}={text} must be one or more values of the type {kind} with commas "
            f"between, such as --sweep.{name}={spelled(field.default)},..."
        )
    return found


def _all_strings(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(isinstance(x, str) for x in found)


def product(
    listed: Sequence[Mapping[str, Any]], axes: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """The overrides of all points: each of `listed` at each point of the axes.

    Raises:
      UserError: a field has an axis and is in the list, or there are too many points.
    """
    both = sorted({name for overrides in listed for name in overrides} & set(axes))
    if both:
        raise UserError(
            f"{both[0]} is in get_sweep() and in --sweep.{both[0]}: leave one of them out"
        )
    count = len(listed) * math.prod(len(values) for values in axes.values())
    if count > MAX_POINTS:
        raise UserError(f"the sweep has {count:,} points, and {MAX_POINTS:,} are allowed")
    grid = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    return [{**overrides, **cell} for overrides in listed for cell in grid]


def check(
    cfg: ConfigDict, overrides: Sequence[Mapping[str, Any]]
) -> list[tuple[Point, ConfigDict]]:
    """The points of a sweep over `cfg`, each with its config, in their order.

    Raises:
      UserError: names the point, its field and what is wrong with it; or two equal points.
    """
    made: list[tuple[Point, ConfigDict]] = []
    seen: dict[str, int] = {}
    for number, given in enumerate(overrides, start=1):
        told = ", ".join(f"{name} = {value!r}" for name, value in given.items())
        where = f"point {number} of {len(overrides)} ({told or 'the config itself'})"
        values = {name: _typed(name, given[name], where) for name in sorted(given)}
        own = cfg.copy_and_resolve_references()
        own.update_from_flattened_dict(values)
        try:
            config_lib.check(own)
            config_lib.check_start(own)
        except UserError as e:
            raise UserError(f"{where}: {e}") from e
        text = config_lib.to_text(own)
        if text in seen:
            raise UserError(f"{where} has the same config as point {seen[text]}: leave one out")
        seen[text] = number
        made.append((Point(name_of(values), values), own))
    return made


def _typed(name: str, value: Any, where: str) -> Any:
    if name not in config_lib.FIELDS:
        raise UserError(f"{where}: unknown field {name}{nearest(name, config_lib.FIELDS)}")
    field = config_lib.FIELDS[name]
    # What numpy counts with, such as geomspace, has numbers of its own.
    value = field.from_json(value.item() if isinstance(value, np.generic) else value)
    if problem := field.type_problem(value):
        raise UserError(f"{where}: {problem}")
    return value


def name_of(overrides: Mapping[str, Any]) -> str:
    """The folder's name of a point: `field=value` with commas between, sorted by field.

    Where that is too long, or has characters that a shell or file system may not like, the rest is
    told by eight digits of its hash.
    """
    if not overrides:
        return "base"
    parts = [(name, spelled(overrides[name])) for name in sorted(overrides)]
    text = ",".join(f"{name}={value}" for name, value in parts)
    plain = all(re.fullmatch(r"[\w.+-]*", value, re.ASCII) for _, value in parts)
    if plain and len(text) <= _MAX_NAME:
        return text
    digest = files.sha256_bytes(files.json_text(dict(overrides)).encode())[:8]
    return re.sub(r"[^\w.=,+-]+", "-", text, flags=re.ASCII)[: _MAX_NAME - 9] + f"-{digest}"


def save(sweep: Sweep, workdir: pathlib.Path) -> None:
    """Write sweep.json."""
    points = [dataclasses.asdict(point) for point in sweep.points]
    value = {**dataclasses.asdict(sweep), "points": points, "format": FORMAT}
    files.write_json(workdir / "sweep.json", json.loads(json.dumps(value)))


def load(workdir: pathlib.Path) -> Sweep:
    """Read sweep.json.

    Raises:
      UserError: there is none, or another file.
    """
    path = workdir / "sweep.json"
    if not path.exists():
        raise UserError(f"{workdir} is no sweep: it has no sweep.json")
    found = inputs.read_json(path, _SWEEP)
    inputs.read_format(found, path, newest=FORMAT)
    points = []
    for point in found["points"]:
        overrides = point["overrides"]
        names = [name for name in overrides if name in config_lib.FIELDS]
        values = config_lib.restore(overrides, names, where=path)
        points.append(Point(point["name"], values))
    rest = found["earlier"], found.get("scoring", {})
    return Sweep(found["command"], found["train"], points, *rest)
