"""How a config field is declared: default, meaning, what it may be, and who may change it.

`experiments/base.py` has the declarations and says all that is known of a field. This module gives
them their form, builds the config from them and checks a single value.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterable
from typing import Any, Literal

from ml_collections import ConfigDict

Change = Literal["fixed", "tunable", "free"]


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config.

    Attributes:
      name: dotted, `section.field`.
      default: neutral; its type is the field's. A float takes integers too.
      meaning: in words, with the unit.
      choices: the values allowed; empty: any.
      at_least, above, at_most, below: bounds of a number.
      change: what a run that has started may do with it: nothing (fixed), change it from the next
        step on if it is told to (tunable), or change it at every start (free).
      before: what held before the field existed, for files that lack it; None: the default.
    """

    name: str
    default: Any
    meaning: str
    choices: tuple[Any, ...] = dataclasses.field(default=(), kw_only=True)
    at_least: float | None = dataclasses.field(default=None, kw_only=True)
    above: float | None = dataclasses.field(default=None, kw_only=True)
    at_most: float | None = dataclasses.field(default=None, kw_only=True)
    below: float | None = dataclasses.field(default=None, kw_only=True)
    change: Change = dataclasses.field(default="fixed", kw_only=True)
    before: Any = dataclasses.field(default=None, kw_only=True)

    @property
    def old(self) -> Any:
        """The value in a file that lacks the field."""
        return self.default if self.before is None else self.before

    def from_json(self, value: Any) -> Any:
        """A value as it was before JSON, which has no tuples and may write 1.0 as 1."""
        if isinstance(self.default, tuple) and isinstance(value, list):
            return _tuples(value)
        exact = isinstance(self.default, float) and type(value) is int
        return float(value) if exact else value

    def type_problem(self, value: Any) -> str:
        """What is wrong with the value's type; empty if nothing is."""
        if isinstance(self.default, float):
            good = isinstance(value, float | int) and not isinstance(value, bool)
        else:
            good = type(value) is type(self.default)
        if good:
            return ""
        expected = type(self.default).__name__
        return f"{self.name} = {value!r} is a {type(value).__name__}, expected a {expected}"

    def value_problem(self, value: Any) -> str:
        """What is wrong with a value of the right type; empty if nothing is."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"{self.name} = {value} is not finite"
        if self.choices and value not in self.choices:
            hint = nearest(str(value), self.choices)
            return f"{self.name} = {value!r} is none of {list(self.choices)}{hint}"
        inside = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        return "" if inside else f"{self.name} = {value} must be {self.range()}"

    def range(self) -> str:
        """The bounds in words; empty if there are none."""
        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        if low is not None and high is not None:
            left, right = "(["[self.above is None], ")]"[self.below is None]
            return f"in {left}{low}, {high}{right}"
        if low is not None:
            above = "positive" if low == 0 else f"above {low}"
            return above if self.at_least is None else f"at least {low}"
        if high is not None:
            return f"at most {high}" if self.below is None else f"below {high}"
        return ""


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


fixed = functools.partial(Field, change="fixed")
tunable = functools.partial(Field, change="tunable")
free = functools.partial(Field, change="free")


def new_config(fields: Iterable[Field]) -> ConfigDict:
    """A config, not yet locked, in which every field has its default."""
    cfg = ConfigDict()
    for field in fields:
        section, _, name = field.name.rpartition(".")
        if section and section not in cfg:
            cfg[section] = ConfigDict()
        (cfg[section] if section else cfg)[name] = field.default
    return cfg


def to_markdown(fields: Iterable[Field]) -> str:
    """The table of all fields that docs/config.md shows, by section."""
    lines, section = [], None
    for field in fields:
        here, _, name = field.name.rpartition(".")
        if here != section:
            section = here
            lines += ["", f"## {here or 'Top level'}", ""]
            lines += ["| field | default | allowed | in a started run | meaning |"]
            lines += ["|---|---|---|---|---|"]
        allowed = ", ".join(repr(choice) for choice in field.choices) or field.range()
        cells = (f"`{name}`", f"`{field.default!r}`", allowed, field.change, field.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean X?)` for the name most like `name`; empty if none is like it."""
    names = list(names)
    last = name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    close += [n for n in names if n.rsplit(".", 1)[-1] == last]
    close += [
        n
        for n in names
        if difflib.get_close_matches(last, [n.rsplit(".", 1)[-1]], n=1, cutoff=0.75)
    ]
    return f" (did you mean {close[0]}?)" if close else ""
