"""Many specialists of one soup, as a YAML file describes them (`entries`), with shared reads.

Each gets a folder of its name below the output folder. One that is there already, and is of the
same entry, documents and checkpoint, stays as it is.
"""

import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from soup_jax import inputs, tree
from soup_jax import storage as files
from soup_jax.data.components import read_rows
from soup_jax.data.domain_histogram import DocumentHistogram, document_histogram
from soup_jax.errors import DamagedError, UserError
from soup_jax.evaluation.sample import read_sample
from soup_jax.evaluation.score import total
from soup_jax.specialists import export
from soup_jax.specialists.entries import Entry, read_entries
from soup_jax.specialists.open import load
from soup_jax.specialists.specialist import Specialist
from soup_jax.specialists.trained import Soup

_log = logging.getLogger(__name__)

# Of merged models that are held together, while the bank is read once for all of them.
_GROUP_BYTES = 8 << 30
# Of a specialist's documents, for the losses that are printed.
_SCORED_TOKENS = 4096


@dataclasses.dataclass(kw_only=True)
class _Wanted:
    # An entry, what was read for it, and what was found.
    entry: Entry
    h_K: np.ndarray
    texts: list[str] = dataclasses.field(default_factory=list)
    histogram: DocumentHistogram | None = None
    alpha_E: np.ndarray | None = None
    digest: str = ""


def instantiate_many(
    run: str | pathlib.Path,
    recipe: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    score: bool = True,
    step: int | None = None,
    average: int = 1,
    corpus_dir: str = "",
    say: Callable[[str], None] = _log.info,
) -> list[dict[str, Any]]:
    """`soup-jax instantiate --recipe`: a folder below `out` for each entry of a YAML file.

    Everything is read and checked before the first is written. What is there already, of the same
    entry, is left as it is: a command that was ended goes on where it was.

    Args:
      score: compare losses on the documents with those of the soup at generic h.

    Returns:
      For each: name, folder, whether it was there already, number of documents, warnings, what its
      recipe says of the search, and nats per token of its documents, its own and the generic h's.

    Raises:
      UserError: names the entry and what is wrong with it.
    """
    entries = read_entries(recipe)
    out = pathlib.Path(out)
    files.check_folder_target(out, "--out")
    for entry in entries:
        for target in _targets(out, entry).values():
            export.check_target(target)
    soup = load(run, step=step, average=average, corpus_dir=corpus_dir)
    wanted = _read(soup, entries, say)
    size = tree.num_bytes([s for n, s in soup.arrays.shapes.items() if n.startswith("shared/")])
    files.check_room(out, len(entries) * size, f"{len(entries)} specialists in {out}")
    missing = [w for w in wanted if not _there(soup, out, w)]
    group = min(max(_GROUP_BYTES // max(size, 1), 1), len(missing))
    if missing:
        say(soup.memory(group, [_method(w) for w in missing]))
    for start in range(0, len(missing), max(group, 1)):
        soup = _make(soup, missing[start : start + group], out)
    made = {w.entry.name for w in missing}
    generic = soup.generic() if score else None
    return [_line(out, w, generic, w.entry.name not in made) for w in wanted]


def _targets(out: pathlib.Path, entry: Entry) -> dict[str, pathlib.Path]:
    exports = {f: out / f"{entry.name}-{f.rpartition(':')[2]}" for f in entry.formats}
    return {"soup_jax": out / entry.name, **exports}


def _read(soup: Soup, entries: Sequence[Entry], say: Callable[[str], None]) -> list[_Wanted]:
    found: dict[str, _Wanted] = {}
    for entry in sorted(entries, key=lambda e: e.blend is not None):  # of others, which come first
        try:
            found[entry.name] = _read_one(soup, entry, found)
        except UserError as e:
            raise UserError(f"{entry.name}: {e}") from e
        if entry.without:
            say(
                f"{entry.name}: without {len(entry.without)} domains; the shared parameters and "
                "experts were trained on them all the same"
            )
    return [found[entry.name] for entry in entries]


def _read_one(soup: Soup, entry: Entry, others: Mapping[str, _Wanted]) -> _Wanted:
    wanted = _Wanted(entry=entry, h_K=soup.map.domain_frequencies)
    if entry.documents:
        sample = read_sample(entry.documents, text_field=soup.cfg.corpus.text_field)
        wanted.texts = [d.text for d in sample.documents]
        for line in [*sample.damage, *sample.warnings()]:
            _log.warning("%s: %s", entry.name, line)
    elif entry.text:
        wanted.texts = [entry.text]
    if wanted.texts:
        wanted.histogram = document_histogram(soup.map, wanted.texts)
        wanted.h_K = wanted.histogram.h_K
        wanted.digest = hashlib.sha256("\0".join(sorted(wanted.texts)).encode()).hexdigest()
    elif entry.h is not None:
        wanted.h_K = _weights(entry.h, soup.num_domains)
    elif entry.blend:
        total = sum(entry.blend.values())
        if by_alpha := [name for name in entry.blend if others[name].entry.alpha is not None]:
            raise UserError(f"blend: {by_alpha[0]} has coefficients and no domain weights")
        parts = [w / total * others[name].h_K for name, w in entry.blend.items()]
        wanted.h_K = np.sum(parts, axis=0)
    elif entry.alpha is not None:
        wanted.alpha_E = _alpha(entry.alpha, soup.num_experts)
    if entry.without:
        wanted.h_K = _left(wanted.h_K, entry.without)
    return wanted


def _weights(given: Any, num_domains: int) -> np.ndarray:
    if isinstance(given, pathlib.Path):
        return read_rows(given, num_domains)[0]
    h_K = np.zeros(num_domains)
    try:
        if isinstance(given, dict):
            h_K[np.array(list(given), np.int64)] = np.array(list(given.values()), np.float64)
            good = all(type(k) is int and 0 <= k < num_domains for k in given)
        else:
            h_K[:] = np.array(given, np.float64)
            good = len(given) == num_domains
    except (TypeError, ValueError, IndexError, OverflowError):
        good = False
    if not good or not np.isfinite(h_K).all() or (h_K < 0).any() or not h_K.sum() > 0:
        raise UserError(
            f"h must be {num_domains} weights of at least 0, or a mapping from domains (0 to "
            f"{num_domains - 1}) to such"
        )
    return h_K / h_K.sum()


def _alpha(given: Any, num_experts: int) -> np.ndarray:
    if isinstance(given, pathlib.Path):
        value = inputs.read_json(given)
        given = value.get("alpha") if isinstance(value, dict) else value
    try:
        alpha_E = np.array(given, np.float32)
    except (TypeError, ValueError):
        alpha_E = np.zeros(0, np.float32)
    if alpha_E.shape != (num_experts,) or not np.isfinite(alpha_E).all():
        raise UserError(f"alpha must be {num_experts} finite numbers, one for each expert")
    return alpha_E


def _left(h_K: np.ndarray, without: Sequence[int]) -> np.ndarray:
    if not all(0 <= k < len(h_K) for k in without):
        raise UserError(f"without: domains are 0 to {len(h_K) - 1}")
    h_K = h_K.copy()
    h_K[list(without)] = 0
    if not h_K.sum() > 0:
        raise UserError("without: all domains that have weight are left out")
    return h_K / h_K.sum()


def _asked(soup: Soup, wanted: _Wanted) -> dict[str, Any]:
    # What a specialist in a folder must have been made from, to be taken as it is.
    alpha_E = wanted.alpha_E
    return {
        "step": soup.step,
        "h": [float(x) for x in wanted.h_K],
        "alpha": None if alpha_E is None else [float(x) for x in alpha_E],
        "documents": wanted.digest,
        "method": wanted.entry.method,
        "config": inputs.sha256_file(soup.workdir / "config.json"),
    }


def _there(soup: Soup, out: pathlib.Path, wanted: _Wanted) -> bool:
    for format_, target in _targets(out, wanted.entry).items():
        path = target / "recipe.json"
        if not path.exists():
            return False
        try:
            found = inputs.read_json(path)
            inputs.check_seal(found, path)
        except UserError:
            return False
        if found.get("asked") != _asked(soup, wanted) or ("exported" in found) != (
            format_ != "soup_jax"
        ):
            return False
    return True


def _method(wanted: _Wanted) -> str:
    return wanted.entry.method if wanted.texts else "histogram"


def _make(soup: Soup, wanted: Sequence[_Wanted], out: pathlib.Path) -> Soup:
    h_MK = np.stack([w.h_K for w in wanted])
    try:
        methods = [_method(w) for w in wanted]
        alpha_ME, h_MK, found = soup.find(h_MK, [w.texts for w in wanted], methods)
        for m, w in enumerate(wanted):
            if w.alpha_E is not None:
                alpha_ME[m] = w.alpha_E
        made = soup.make(h_MK, alpha_ME, histograms=[w.histogram for w in wanted], found=found)
    except DamagedError as e:
        return _make(soup.earlier(e), wanted, out)
    for w, specialist in zip(wanted, made):
        specialist = dataclasses.replace(
            specialist, recipe={**specialist.recipe, "asked": _asked(soup, w)}
        )
        for format_, target in _targets(out, w.entry).items():
            specialist.save(target, format=format_)
    return soup


def _line(
    out: pathlib.Path, wanted: _Wanted, generic: Specialist | None, there: bool
) -> dict[str, Any]:
    folder, histogram = out / wanted.entry.name, wanted.histogram
    line = {
        "name": wanted.entry.name,
        "folder": str(folder),
        "there": there,
        "documents": histogram.num_documents if histogram else 0,
        "warnings": histogram.warnings() if histogram else [],
        "search": inputs.read_json(folder / "recipe.json").get("search"),
        "loss": None,
        "generic": None,
    }
    if generic is not None and wanted.texts:
        specialist = Specialist.load(folder, model=generic.model)
        texts = _first(wanted.texts, generic)
        line["loss"] = total(specialist.score(texts)).loss
        line["generic"] = total(generic.score(texts)).loss
    return line


def _first(texts: Sequence[str], model: Specialist) -> list[str]:
    # Enough of them to tell what the specialist gains; the others are not tokenised.
    taken, tokens = [], 0
    for text in texts:
        taken.append(text)
        tokens += int(model.tokenizer.lengths([text])[0])
        if tokens >= _SCORED_TOKENS:
            break
    return taken


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines of `instantiate_many` as aligned text."""
    width = max(len(line["name"]) for line in lines)

    def row(name: str, *cells: str) -> str:
        return f"{name:<{width}}  " + "  ".join(f"{cell:>10}" for cell in cells)

    rows = [row("", "documents", "specialist", "generic_h", "gain", "by search")]
    for line in lines:
        loss, generic, found = line["loss"], line["generic"], line["search"]
        gain = found["start_loss"] - found["loss"] if found and found["loss"] else None
        rows.append(
            row(
                line["name"],
                str(line["documents"] or "-"),
                *("-" if x is None else f"{x:.4f}" for x in (loss, generic)),
                "-" if loss is None else f"{generic - loss:.4f}",
                "-" if gain is None else f"{gain:.4f}",
            )
        )
    return "\n".join(
        [
            *rows,
            "(nats per token of their own documents, which gave h; by search: of documents that "
            "were held back from it)",
        ]
    )
