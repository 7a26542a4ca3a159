"""Loading, checking, saving and comparing configs.

`experiments/base.py` is the schema: a config has exactly its fields, with its types and bounds.
`check` is what everything that takes a config calls first.
"""

import json
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from soup_jax.config.fields import nearest
from soup_jax.errors import UserError
from soup_jax.experiments import base
from soup_jax.storage import read_json, write_json

FIELDS = {field.name: field for field in base.FIELDS}


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
    """Write the resolved config as JSON."""
    write_json(path, json.loads(cfg.to_json()))


def load(path: pathlib.Path) -> ConfigDict:
    """Read a config written by `save`, checked against today's schema."""
    cfg = base.get_config()
    problems = []
    reference = dict(flat_items(cfg))
    found = dict(flat_items(read_json(path)))
    for name, value in found.items():
        if name not in reference:
            problems.append(f"unknown field {name}{nearest(name, reference)}")
            continue
        with cfg.unlocked():
            cfg.update_from_flattened_dict({name: _restore_type(value, reference[name])})
    missing = sorted(set(reference) - set(found))
    if missing:
        problems.append(f"missing fields {missing} (add them, with the values that hold for it)")
    if problems:
        raise UserError(f"{path} was written by another version: " + "; ".join(problems))
    return check(cfg)


def _restore_type(value: Any, reference: Any) -> Any:
    # JSON has no tuples; nested ones (experts.rules) come back as lists of lists.
    if isinstance(reference, tuple):
        return _tuples(value)
    return type(reference)(value) if isinstance(reference, float) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


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


def _check_combinations(cfg: ConfigDict) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"config: {message}")

    _divides(cfg, "num_mixtures", "batch_size")
    rows = cfg.batch_size // cfg.num_mixtures
    need(
        rows % cfg.optimizer.grad_accumulation == 0,
        f"optimizer.grad_accumulation = {cfg.optimizer.grad_accumulation} must divide the {rows} "
        "rows of a mixture (batch_size / num_mixtures)",
    )
    need(
        all(isinstance(a, tuple) and len(a) == 2 and isinstance(a[0], str) for a in cfg.model.args),
        f"model.args must be a tuple of (name, value) pairs, not {cfg.model.args!r}",
    )
    weights = cfg.domain_weights
    need(
        all(_is_component(c) for c in weights.components),
        "domain_weights.components must be a tuple of (name, probability) or (name, probability, "
        f"((argument, value), ...)), not {weights.components!r}",
    )
    total = weights.sparse + weights.generic + weights.dirichlet + weights.file
    total += sum(probability for _, probability, *_ in weights.components)
    need(
        abs(total - 1) < 1e-6,
        "domain_weights.sparse + generic + dirichlet + file and those of domain_weights.components "
        f"are probabilities and must add up to 1, not {total:g}",
    )
    need(
        weights.min_support_size <= weights.support_size <= cfg.num_domains,
        f"domain_weights.min_support_size = {weights.min_support_size} <= support_size = "
        f"{weights.support_size} <= num_domains = {cfg.num_domains} must hold",
    )
    need(
        (weights.file > 0) == bool(weights.path),
        "domain_weights.file > 0 and domain_weights.path go together: "
        f"file = {weights.file}, path = {weights.path!r}",
    )
    need(
        cfg.corpus.validation_fraction + cfg.corpus.held_out_fraction < 1,
        "corpus.validation_fraction + corpus.held_out_fraction must leave documents to train on",
    )
    need(
        cfg.evaluate.tuning_fraction < 1 - cfg.evaluate.histogram_fraction,
        "evaluate.histogram_fraction and tuning_fraction must leave documents for all parts: "
        "histogram_fraction + tuning_fraction < 1",
    )
    need(
        all(isinstance(r, tuple) and [type(x) for x in r] == [str, str] for r in cfg.experts.rules),
        f"experts.rules must be a tuple of (regex, rule) pairs, not {cfg.experts.rules!r}",
    )


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


def diff(old: ConfigDict, new: ConfigDict, *, ignore: Collection[str] = ()) -> list[str]:
    """One line per field whose value differs, but for the names in `ignore`."""
    before, after = dict(flat_items(old)), dict(flat_items(new))
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name) and name not in ignore
    ]
