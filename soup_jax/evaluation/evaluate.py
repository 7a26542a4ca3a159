"""Losses of specialists, baselines and the shared parameters on held-out text.

A specialist is a file (or glob) of documents. They are split by document hash into three parts: one
gives the histogram h; `tuning` is scored during training, for choosing settings; `final` is what
`soup-jax evaluate` scores, so that what it reports was used for no choice. Columns: `specialist`
(merged at its own h), `generic_h` (merged at the natural frequencies), `shared` (S alone), and one
per run compared with.

Losses are nats per token; bits per byte divide by the bytes of the scored tokens, and are what to
compare between runs with different tokenizers.
"""

import dataclasses
import glob
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from soup_jax import soup
from soup_jax.data import sources as corpus_lib
from soup_jax.data.corpus import Corpus
from soup_jax.data.domain_histogram import DocumentHistogram, document_histogram
from soup_jax.data.loader import num_targets
from soup_jax.errors import UserError
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Params
from soup_jax.soup import SoupConfig, merge
from soup_jax.soup import layout as sharding


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """Windows to score: tokens [n, L + 1], real targets of each [n], bytes those stand for."""

    tokens: np.ndarray
    num_targets: np.ndarray
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class SpecialistSet:
    """One specialist: its domain weights from one part of its documents, windows of the other."""

    name: str
    histogram: DocumentHistogram
    scored: TokenSet


def document_sets(patterns: Sequence[str]) -> dict[str, str]:
    """Name -> path of the specialist files; the name is the file's without its suffixes.

    Raises:
      UserError: a pattern matches nothing, or two files have one name.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise UserError(f"no specialist file matches {pattern!r}")
        for path in paths:
            name = pathlib.Path(path).name.split(".")[0]
            if found.setdefault(name, path) != path:
                raise UserError(f"two specialist files are named {name!r}: {found[name]}, {path}")
    return found


def read_texts(path: str, *, text_field: str) -> tuple[list[corpus_lib.Document], list[str]]:
    """Documents of a specialist file, exact duplicates removed, and lines on what was damaged.

    Raises:
      UserError: no document could be read.
    """
    report = corpus_lib.Report()
    files = corpus_lib.find_files([path], report)
    documents = {d.hash: d for d in corpus_lib.read_documents(files, text_field, report)}
    if not documents:
        raise UserError(f"{path} holds no readable document: {report.lines()}")
    return list(documents.values()), report.lines()


PARTS = ("final", "tuning")


def specialist_set(
    name: str, path: str, corpus: Corpus, cfg: ConfigDict, *, part: str = "final"
) -> SpecialistSet:
    """Read, split, histogram and tokenise one specialist.

    Args:
      part: of the documents, to score: one of PARTS. With `evaluate.tuning_fraction` = 0 there is
        no tuning part, and both names mean all documents that do not give h.

    Raises:
      UserError: a part of the split is empty.
    """
    documents, _ = read_texts(path, text_field=cfg.corpus.text_field)
    end_h = cfg.evaluate.histogram_fraction
    start, end = end_h + cfg.evaluate.tuning_fraction, 1.0
    if part == "tuning" and cfg.evaluate.tuning_fraction:
        start, end = end_h, start
    place = {d.text: corpus_lib.hash_fraction(d.hash) for d in documents}
    for_h = [text for text, at in place.items() if at < end_h]
    scored = [text for text, at in place.items() if start <= at < end]
    if not for_h or not scored:
        raise UserError(
            f"specialist {name!r} ({path}) has {len(for_h)} documents for h and {len(scored)} to "
            f"score (part {part!r}); both need some: give more documents or change "
            "evaluate.histogram_fraction and evaluate.tuning_fraction"
        )
    return SpecialistSet(
        name,
        document_histogram(corpus, for_h),
        pack(corpus, scored, max_windows=cfg.evaluate.max_windows),
    )


def pack(corpus: Corpus, texts: Sequence[str], *, max_windows: int) -> TokenSet:
    """Texts as windows of the corpus's length; every token of the kept windows is scored once."""
    tokenizer, length = corpus.tokenizer(), corpus.seq_len
    stream = [corpus.eos_id]
    for ids in tokenizer.encode_batch(list(texts)):
        stream += [*ids, corpus.eos_id]
    count = max(math.ceil((len(stream) - 1) / length), 1)
    padded = np.full(count * length + 1, corpus.eos_id, np.int32)
    padded[: len(stream)] = stream
    tokens = np.stack([padded[i * length : (i + 1) * length + 1] for i in range(count)])
    real = np.full(count, length, np.int32)
    real[-1] = len(stream) - 1 - (count - 1) * length
    return _token_set(corpus, tokens, real, max_windows)


def validation_set(corpus: Corpus, *, max_windows: int) -> TokenSet:
    """The generic validation split, or `max_windows` of it evenly spread over all domains.

    Raises:
      UserError: the corpus has no validation windows.
    """
    offsets = corpus.offsets["validation"]
    total = int(offsets[-1])
    if not total:
        raise UserError(
            f"{corpus.path} has no validation windows; prepare with a larger "
            "corpus.validation_fraction"
        )
    ids = _spread(total, max_windows)
    domain = np.searchsorted(offsets, ids, side="right") - 1
    tokens = corpus.read_windows("validation", ids)
    real = num_targets(corpus, "validation", domain, ids - offsets[domain])
    return _token_set(corpus, tokens, real, 0)


def _spread(total: int, most: int) -> np.ndarray:
    if not most or total <= most:
        return np.arange(total)
    return (np.arange(most) * total) // most


def _token_set(corpus: Corpus, tokens: np.ndarray, real: np.ndarray, max_windows: int) -> TokenSet:
    kept = _spread(len(tokens), max_windows)
    tokens, real = tokens[kept], real[kept]
    tokenizer = corpus.tokenizer()
    num_bytes = sum(tokenizer.num_bytes(row[1 : 1 + n]) for row, n in zip(tokens, real))
    return TokenSet(tokens, real, num_bytes)


class Evaluator:
    """Scores token sets under merged models of one soup; compiles each function once.

    With many processes, all call the same methods with the same sets and get the same numbers.
    """

    def __init__(self, config: SoupConfig, model: BaseModel, mesh: Mesh, *, batch_size: int):
        """Settings, model and mesh are those of the run that is evaluated.

        Args:
          batch_size: windows per forward pass, rounded up to the devices.
        """
        self._mesh = mesh
        self._rows = -(-batch_size // mesh.size) * mesh.size
        everywhere = sharding.replicated(mesh)

        def merged(params: Params, h_K: jax.Array) -> Params:
            return _cast(soup.specialist(params, h_K, config)[0], config.compute_dtype)

        def shared(params: Params) -> Params:
            return _cast(merge.merge(params["shared"], {}, jnp.zeros((0,))), config.compute_dtype)

        def score(theta: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
            losses, weights = model.example_losses(theta, batch)
            axes = tuple(range(1, losses.ndim))
            return (losses * weights).sum(axes), weights.sum(axes)

        self._merged = jax.jit(merged, out_shardings=everywhere)
        self._shared = jax.jit(shared, out_shardings=everywhere)
        self._score = jax.jit(score, out_shardings=everywhere)

    def at(self, params: Params, h_K: np.ndarray) -> Params:
        """Theta(h) on every device."""
        return self._merged(params, np.asarray(h_K, np.float32))

    def shared(self, params: Params) -> Params:
        """S on every device."""
        return self._shared(params)

    def _spread(self, value: np.ndarray) -> jax.Array:
        # Every process has all rows, and gives its devices theirs.
        where = sharding.batch(self._mesh)
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

    def loss(
        self, theta: Params, scored: TokenSet, *, between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """{"loss": nats per token, "bits_per_byte"}; `between` is called after each batch."""
        total, weight = 0.0, 0.0
        for start in range(0, len(scored.tokens), self._rows):
            chunk = slice(start, start + self._rows)
            tokens, real = scored.tokens[chunk], scored.num_targets[chunk]
            missing = self._rows - len(tokens)
            batch = {
                "tokens": np.pad(tokens, ((0, missing), (0, 0))),
                "num_targets": np.pad(real, (0, missing)),
            }
            batch = {name: self._spread(value) for name, value in batch.items()}
            loss, weights = self._score(theta, batch)
            total += float(np.asarray(loss, np.float64).sum())
            weight += float(np.asarray(weights, np.float64).sum())
            between()
        if weight == 0:
            raise UserError("no tokens to score")
        return {
            "loss": total / weight,
            "bits_per_byte": total / math.log(2) / max(scored.num_bytes, 1),
        }


def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def evaluate(
    evaluator: Evaluator,
    params: Params,
    corpus: Corpus,
    *,
    specialists: Iterable[SpecialistSet],
    validation: TokenSet | None,
    columns: Sequence[str] = ("specialist", "generic_h", "shared"),
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The result dict of one run (see `combine` for several).

    Returns:
      {"specialists": {NAME: {"tokens", "bytes", COLUMN: {"loss", "bits_per_byte"}}},
       "average": {COLUMN: {...}}, "generic_validation": {COLUMN: {...}}}; the average is over
      specialists, each with the same weight.
    """
    fixed = {}
    if "generic_h" in columns:
        fixed["generic_h"] = evaluator.at(params, corpus.domain_frequencies)
    if "shared" in columns:
        fixed["shared"] = evaluator.shared(params)
    rows: dict[str, Any] = {}
    for s in specialists:
        row: dict[str, Any] = {
            "tokens": int(s.scored.num_targets.sum()),
            "bytes": s.scored.num_bytes,
        }
        if "specialist" in columns:
            theta = evaluator.at(params, s.histogram.h_K)
            row["specialist"] = evaluator.loss(theta, s.scored, between=between)
            del theta
        for name, theta in fixed.items():
            row[name] = evaluator.loss(theta, s.scored, between=between)
        rows[s.name] = row
    result: dict[str, Any] = {"specialists": rows, "average": {}, "generic_validation": {}}
    if rows:
        result["average"] = {c: _average(rows, c) for c in columns}
    if validation is not None:
        result["generic_validation"] = {
            name: evaluator.loss(theta, validation, between=between)
            for name, theta in fixed.items()
        }
    return result


def _average(rows: dict[str, Any], column: str) -> dict[str, float]:
    return {
        key: float(np.mean([row[column][key] for row in rows.values()]))
        for key in ("loss", "bits_per_byte")
    }


def combine(result: dict[str, Any], other: dict[str, Any], name: str) -> None:
    """Add another run's own specialists to `result` as the column `name`."""
    for specialist, row in result["specialists"].items():
        row[name] = other["specialists"][specialist]["specialist"]
    result["average"][name] = other["average"]["specialist"]
    result["generic_validation"][name] = other["generic_validation"]["generic_h"]


def table(result: dict[str, Any], *, metric: str = "loss") -> str:
    """The result as aligned text, one line per specialist; the best column of a line is starred."""
    columns = list(result["average"])
    width = max([len(n) for n in result["specialists"]] + [len("generic validation")])
    widths = [max(len(c), 9) for c in columns]

    def line(name: str, values: dict[str, Any]) -> str:
        numbers = [values.get(c, {}).get(metric) for c in columns]
        best = min((n for n in numbers if n is not None), default=None)
        cells = [
            " " * w if n is None else f"{n:.4f}{'*' if n == best else ' '}".rjust(w)
            for n, w in zip(numbers, widths)
        ]
        return f"{name:<{width}}  " + "  ".join(cells)

    header = f"{'':<{width}}  " + "  ".join(c.rjust(w - 1) + " " for c, w in zip(columns, widths))
    lines = [header, *(line(n, row) for n, row in result["specialists"].items())]
    lines += ["", line("average", result["average"])]
    if result["generic_validation"]:
        lines.append(line("generic validation", result["generic_validation"]))
    unit = "nats per token" if metric == "loss" else "bits per byte"
    return (
        "\n".join(text.rstrip() for text in lines)
        + f"\n({unit}; lower is better; * best of the line)"
    )
