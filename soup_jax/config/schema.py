"""Loading, checking, saving and comparing configs.

`experiments/base.py` is the schema: a config has exactly its fields, with its types and bounds.
Everything that takes a config calls `check` first.
"""

import json
import logging
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from soup_jax.config.fields import Change, nearest
from soup_jax.errors import UserError
from soup_jax.experiments import base
from soup_jax.inputs import read_format, read_json
from soup_jax.storage import sealed, write_json

_log = logging.getLogger(__name__)

# Today's fields that an old value stands for; None if it means nothing today.
Meaning = Callable[[Any], dict[str, Any] | None]

FORMAT = 2  # of config.json; the first had no number
FIELDS = {field.name: field for field in base.FIELDS}


def was(neutral: Any) -> Meaning:
    """The meaning of a field that is gone without a successor: none, at its neutral value."""
    return lambda value: {} if value == neutral else None


# Fields of earlier versions -> what a value of theirs means in today's fields.
GONE: dict[str, Meaning] = {
    "optimizer.flush_every": was(1),  # updates of the bank that were deferred
    "log.tensorboard": lambda value: {"log.trackers": ("tensorboard",) if value else ()},
}


def flat_items(cfg: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field, sorted by name."""
    for key in sorted(cfg):
        value = cfg[key]
        if isinstance(value, Mapping | ConfigDict):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_text(cfg: ConfigDict) -> str:
    """One `name = value` line per field: the golden dump, and what a run prints at its start."""
    return "".join(f"{name} = {value!r}\n" for name, value in flat_items(cfg))


def save(cfg: ConfigDict, path: pathlib.Path) -> None:
    """Write the resolved config as JSON, with its format number and a seal beside the fields."""
    write_json(path, sealed({"format": FORMAT, **json.loads(cfg.to_json())}))


def load(path: pathlib.Path) -> ConfigDict:
    """Read a config written by `save`, of this version or an earlier one.

    Raises:
      UserError: another file, of a later version, or with fields that mean nothing today.
    """
    found = read_json(path)
    read_format(found, path, newest=FORMAT)
    if "seal" in found and found != sealed(found):
        # By hand, perhaps, and on purpose.
        _log.warning("%s was changed since soup_jax wrote it, and is taken as it is now", path)
    fields = {name: value for name, value in found.items() if name not in ("format", "seal")}
    values = restore(dict(flat_items(fields)), FIELDS, where=path)
    cfg = base.get_config()
    with cfg.unlocked():
        cfg.update_from_flattened_dict(values)
    try:
        return check(cfg)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def restore(
    found: Mapping[str, Any], names: Collection[str], *, where: str | os.PathLike
) -> dict[str, Any]:
    """Values of the fields `names` from those in a file, which an earlier version may have written.

    A field that did not exist yet has the value that held then; one that is gone counts as what it
    means today.

    Raises:
      UserError: names every field that means nothing today, or has another type.
    """
    values, problems = {name: FIELDS[name].old for name in names}, []
    for name, value in translated(found).items():
        if name not in values:
            reason = "is gone" if name in GONE else f"is unknown{nearest(name, names)}"
            problems.append(f"the field {name} = {value!r} {reason}")
            continue
        values[name] = FIELDS[name].from_json(value)
        problems.append(FIELDS[name].type_problem(values[name]))
    if problems := [problem for problem in problems if problem]:
        raise UserError(f"{where} was written by another version: {'; '.join(problems)}")
    return values


def restore_section(
    section: str, found: Mapping[str, Any], *, where: str | os.PathLike
) -> dict[str, Any]:
    """`restore` of one section, whose fields are named without it; the values are checked, too."""
    names = [name for name in FIELDS if name.startswith(f"{section}.")]
    values = restore(dict(flat_items(found, f"{section}.")), names, where=where)
    for name, value in values.items():
        if problem := FIELDS[name].value_problem(value):
            raise UserError(f"{where}: {problem}")
    return {name.removeprefix(f"{section}."): value for name, value in values.items()}


def translated(found: Mapping[str, Any]) -> dict[str, Any]:
    """`found` with today's fields in place of those that are gone, where their value has a meaning
    today; the others stay."""
    values: dict[str, Any] = {}
    for name, value in found.items():
        meaning = GONE[name](value) if name in GONE else None
        values |= {name: value} if meaning is None else meaning
    return values


def check(cfg: ConfigDict) -> ConfigDict:
    """Refuse a config that differs from the schema or cannot work; returns it locked.

    Raises:
      UserError: names every unknown, missing or mistyped field, with the nearest valid name, or
        the first impossible value or combination.
    """
    values = dict(flat_items(cfg))
    problems = [
        FIELDS[name].type_problem(value)
        if name in FIELDS
        else f"unknown field {name}{nearest(name, FIELDS)}"
        for name, value in values.items()
    ]
    missing = sorted(FIELDS.keys() - values)
    if missing:
        problems.append(
            f"missing fields {', '.join(missing)} (was a section replaced as a whole? set single "
            "fields, as in --config.section.field=value)"
        )
    if found := [problem for problem in problems if problem]:
        raise UserError("config: " + "; ".join(found))
    for name, value in values.items():
        if problem := FIELDS[name].value_problem(value):
            raise UserError(f"config: {problem}")
    _check_combinations(cfg)
    return cfg.lock()


def check_start(cfg: ConfigDict) -> None:
    """Refuse what no new run may have, though `check` lets older runs have it.

    Raises:
      UserError: a schedule that never reaches its rate, a seed that jax would cut, or bounds of a
        document's length that exclude each other.
    """
    check_lengths(cfg)
    o, steps = cfg.optimizer, cfg.num_steps
    _need(
        o.warmup_steps < steps,
        f"optimizer.warmup_steps = {o.warmup_steps} must be below num_steps = {steps}, or the rate "
        f"is never reached: set --config.optimizer.warmup_steps={steps // 10}",
    )
    _need(
        o.schedule != "wsd" or o.warmup_steps + o.decay_steps <= steps,
        f"optimizer.warmup_steps = {o.warmup_steps} and decay_steps = {o.decay_steps} are more "
        f"than num_steps = {steps} together: lower one of them",
    )
    _need(cfg.seed < 1 << 32, f"seed = {cfg.seed} must be below 2^32 = {1 << 32}")


def check_lengths(cfg: ConfigDict) -> None:
    """UserError if no document has a length that `corpus` allows."""
    shortest, longest = cfg.corpus.min_chars, cfg.corpus.max_chars
    _need(
        shortest <= longest,
        f"corpus.min_chars = {shortest} must be at most corpus.max_chars = {longest}",
    )


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"config: {message}")


def _check_combinations(cfg: ConfigDict) -> None:
    _divides(cfg, "num_mixtures", "batch_size")
    rows = cfg.batch_size // cfg.num_mixtures
    _need(
        rows % cfg.optimizer.grad_accumulation == 0,
        f"optimizer.grad_accumulation = {cfg.optimizer.grad_accumulation} must divide the {rows} "
        "rows of a mixture (batch_size / num_mixtures)",
    )
    _need(
        all(isinstance(a, tuple) and len(a) == 2 and isinstance(a[0], str) for a in cfg.model.args),
        f"model.args must be a tuple of (name, value) pairs, not {cfg.model.args!r}",
    )
    steps = cfg.log.profile
    _need(
        not steps
        or (len(steps) == 2 and all(type(s) is int for s in steps) and 1 <= steps[0] <= steps[1]),
        f"log.profile = {steps!r} must be the first and the last step of a trace, as in (20, 24)",
    )
    weights = cfg.domain_weights
    _need(
        all(_is_component(c) for c in weights.components),
        "domain_weights.components must be a tuple of (name, probability) or (name, probability, "
        f"((argument, value), ...)), not {weights.components!r}",
    )
    total = weights.sparse + weights.generic + weights.dirichlet + weights.file
    total += sum(probability for _, probability, *_ in weights.components)
    _need(
        abs(total - 1) < 1e-6,
        "domain_weights.sparse + generic + dirichlet + file and those of domain_weights.components "
        f"are probabilities and must add up to 1, not {total:g}",
    )
    _need(
        weights.min_support_size <= weights.support_size <= cfg.num_domains,
        f"domain_weights.min_support_size = {weights.min_support_size} <= support_size = "
        f"{weights.support_size} <= num_domains = {cfg.num_domains} must hold",
    )
    _need(
        (weights.file > 0) == bool(weights.path),
        "domain_weights.file > 0 and domain_weights.path go together: "
        f"file = {weights.file}, path = {weights.path!r}",
    )
    _need(
        cfg.corpus.validation_fraction + cfg.corpus.held_out_fraction < 1,
        "corpus.validation_fraction + corpus.held_out_fraction must leave documents to train on",
    )
    _need(
        cfg.evaluate.tuning_fraction < 1 - cfg.evaluate.histogram_fraction,
        "evaluate.histogram_fraction and tuning_fraction must leave documents for all parts: "
        "histogram_fraction + tuning_fraction < 1",
    )
    _need(
        all(isinstance(r, tuple) and [type(x) for x in r] == [str, str] for r in cfg.experts.rules),
        f"experts.rules must be a tuple of (regex, rule) pairs, not {cfg.experts.rules!r}",
    )
    _need(
        bool(cfg.checkpoint.init_from) or not cfg.checkpoint.init_step,
        f"checkpoint.init_step = {cfg.checkpoint.init_step} is a step of the run "
        "checkpoint.init_from, which is empty",
    )
    _check_skipped(cfg.skip_batches)


def _check_skipped(pairs: Any) -> None:
    end = -1
    for pair in pairs:
        good = isinstance(pair, tuple) and [type(x) for x in pair] == [int, int]
        if not good or not end < pair[0] <= pair[1]:
            raise UserError(
                "config: skip_batches must be pairs (first, last) of steps, each after the one "
                f"before, such as ((4100, 4105),), not {pairs!r}"
            )
        end = pair[1]


def _is_component(value: Any) -> bool:
    match value:
        case (str(), float() | int() as probability):
            return probability >= 0
        case (str(), float() | int() as probability, tuple() as arguments):
            return probability >= 0 and all(
                isinstance(a, tuple) and len(a) == 2 and isinstance(a[0], str) for a in arguments
            )
    return False


def _divides(cfg: ConfigDict, small: str, large: str) -> None:
    values = dict(flat_items(cfg))
    if values[large] % values[small]:
        raise UserError(f"config: {small} = {values[small]} must divide {large} = {values[large]}")


def diff(old: ConfigDict, new: ConfigDict, *kinds: Change) -> dict[str, tuple[Any, Any]]:
    """{name: (old value, new value)} of the fields that differ, of these kinds; none given: all."""
    before, after = dict(flat_items(old)), dict(flat_items(new))
    return {
        name: (before[name], after[name])
        for name, field in FIELDS.items()
        if before[name] != after[name] and (not kinds or field.change in kinds)
    }
