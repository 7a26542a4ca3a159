"""Loading, checking, saving and comparing configs.

`experiments/base.py` is the schema: a config has exactly its fields, with its types. `parse` is
what the command line uses; `check` what everything else that takes a config calls first.
"""

import difflib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from soup_jax import rules
from soup_jax.errors import UserError
from soup_jax.experiments import base
from soup_jax.storage import write_json


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
    from soup_jax.storage import read_json

    cfg = base.get_config()
    problems = []
    reference = dict(flat_items(cfg))
    found = dict(flat_items(read_json(path)))
    for name, value in found.items():
        if name not in reference:
            problems.append(f"unknown field {name}{_nearest(name, reference)}")
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
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return type(reference)(value) if isinstance(reference, float) else value


def _nearest(name: str, names: Mapping[str, Any]) -> str:
    last = name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    close += [n for n in names if n.rsplit(".", 1)[-1] == last]
    close += [
        n
        for n in names
        if difflib.get_close_matches(last, [n.rsplit(".", 1)[-1]], n=1, cutoff=0.75)
    ]
    return f" (did you mean {close[0]}?)" if close else ""


def check(cfg: ConfigDict) -> ConfigDict:
    """Refuse a config that differs from the schema or cannot work; returns it locked.

    Raises:
      UserError: names every unknown, missing or mistyped field, with the nearest valid name, or
        the first impossible combination.
    """
    reference = dict(flat_items(base.get_config()))
    found = dict(flat_items(cfg))
    problems = []
    for name, value in found.items():
        if name not in reference:
            problems.append(f"unknown field {name}{_nearest(name, reference)}")
        elif not _same_type(value, reference[name]):
            problems.append(
                f"{name} = {value!r} is a {type(value).__name__}, "
                f"expected a {type(reference[name]).__name__}"
            )
    missing = [name for name in reference if name not in found]
    if missing:
        problems.append(
            f"missing fields {', '.join(missing)} (was a section replaced as a whole? set single "
            "fields, as in --config.section.field=value)"
        )
    if problems:
        raise UserError("config: " + "; ".join(problems))
    _check_values(cfg)
    return cfg.lock()


def _same_type(value: Any, reference: Any) -> bool:
    if isinstance(reference, float):
        return isinstance(value, float | int) and not isinstance(value, bool)
    return type(value) is type(reference)


CHOICES = {
    "embed.kind": ("tfidf_svd",),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "full", "dots"),
    "model.attention": ("auto", "xla", "cudnn"),
    "experts.dtype": ("float32", "bfloat16"),
    "router.normalization": ("none", "softmax", "tanh", "l2", "ball"),
    "router.init": ("random", "centroids"),
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "optimizer.bank": ("merged", "adamw"),
    "experts.rounding": ("stochastic", "nearest"),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
    "mesh.gather": ("step", "layer"),
    "mesh.platform": ("", "cpu", "gpu", "tpu"),
}
AT_LEAST = {  # inclusive lower bounds
    **dict.fromkeys(
        """num_domains num_mixtures batch_size num_steps seq_len loader.num_threads loader.prefetch
        model.num_layers model.dim model.num_heads model.num_kv_heads model.hidden_dim embed.dim
        embed.max_features embed.fit_documents embed.max_chars corpus.max_chars
        tokenizer.train_bytes domain_weights.support_size domain_weights.min_support_size
        optimizer.grad_accumulation optimizer.flush_every evaluate.batch_size log.every_steps
        checkpoint.keep_latest
        checkpoint.async_timeout_secs distributed.init_timeout_secs""".split(),
        1,
    ),
    **dict.fromkeys(
        """seed num_experts corpus.min_chars corpus.num_workers router.hidden_dim
        domain_weights.support_exponent domain_weights.sparse
        domain_weights.generic domain_weights.dirichlet domain_weights.file
        experts.init_scale optimizer.warmup_steps optimizer.decay_steps optimizer.weight_decay
        optimizer.clip_norm optimizer.bank_lr_scale optimizer.router_lr_scale
        optimizer.final_fraction model.loss_chunk
        checkpoint.every_steps checkpoint.keep_every evaluate.every_steps
        evaluate.max_windows mesh.num_devices corpus.validation_fraction
        corpus.held_out_fraction log.peak_tflops distributed.step_timeout_secs""".split(),
        0,
    ),
    "distributed.heartbeat_timeout_secs": 5,  # processes report every second
    "vocab_size": 257,  # 256 bytes and the end-of-text token
}
POSITIVE = (
    "optimizer.learning_rate",
    "optimizer.eps",
    "domain_weights.concentration",
    "model.rope_theta",
    "model.norm_eps",
    "router.scale",
)


def _check_values(cfg: ConfigDict) -> None:
    values = dict(flat_items(cfg))
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config: {name} = {value} is not finite")
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            raise UserError(
                f"config: {name} = {values[name]!r} is none of {list(choices)}"
                f"{_nearest(str(values[name]), dict.fromkeys(choices))}"
            )
    for name, least in AT_LEAST.items():
        if values[name] < least:
            raise UserError(f"config: {name} = {values[name]} must be at least {least}")
    for name in POSITIVE:
        if values[name] <= 0:
            raise UserError(f"config: {name} = {values[name]} must be positive")
    for name in ("optimizer.beta1", "optimizer.beta2"):
        if not 0 <= values[name] < 1:
            raise UserError(f"config: {name} = {values[name]} must be in [0, 1)")
    _check_combinations(cfg)


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
    total = weights.sparse + weights.generic + weights.dirichlet + weights.file
    need(
        abs(total - 1) < 1e-6,
        "domain_weights.sparse + generic + dirichlet + file are probabilities and must add up to "
        f"1, not {total:g}",
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
        cfg.evaluate.histogram_fraction > 0
        and 0 <= cfg.evaluate.tuning_fraction < 1 - cfg.evaluate.histogram_fraction,
        "evaluate.histogram_fraction and tuning_fraction must leave documents for all parts: "
        "0 < histogram_fraction, histogram_fraction + tuning_fraction < 1",
    )
    need(
        cfg.optimizer.flush_every == 1 or cfg.optimizer.bank == "merged",
        f"optimizer.flush_every = {cfg.optimizer.flush_every} defers updates, which "
        f"optimizer.bank = {cfg.optimizer.bank!r} cannot: set it to 1, or the bank's to 'merged'",
    )
    need(cfg.optimizer.final_fraction <= 1, "optimizer.final_fraction must be at most 1")
    need(
        all(isinstance(r, tuple) and [type(x) for x in r] == [str, str] for r in cfg.experts.rules),
        f"experts.rules must be a tuple of (regex, rule) pairs, not {cfg.experts.rules!r}",
    )
    for _, rule in cfg.experts.rules:
        try:
            rules.low_rank(rule)
        except UserError as e:
            raise UserError(f"config: experts.rules: {e}") from e


def _divides(cfg: ConfigDict, small: str, large: str) -> None:
    values = dict(flat_items(cfg))
    if values[large] % values[small]:
        raise UserError(f"config: {small} = {values[small]} must divide {large} = {values[large]}")


def diff(old: ConfigDict, new: ConfigDict, *, ignore: Sequence[str] = ()) -> list[str]:
    """One line per field whose value differs, but for names that start with one of `ignore`."""
    before, after = dict(flat_items(old)), dict(flat_items(new))
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name) and not name.startswith(tuple(ignore))
    ]
