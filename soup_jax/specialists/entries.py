"""A YAML file that describes many specialists of one soup.

    defaults:                       # for all that do not say otherwise
      method: search
    specialists:
      law:
        documents: [contracts/*.jsonl, statutes.txt]
      cooking:
        text: recipes with butter and flour      # a topic in words, instead of documents
        formats: [hf, gguf]                      # exports, beside the specialist itself
      half:
        blend: {law: 1, cooking: 1}              # of the domain weights of others of this file
      by_hand:
        h: {3: 0.5, 17: 0.5}                     # domain weights; or [K numbers]; or a JSON file
        without: [17]                            # domains that get no weight
      again:
        alpha: law/recipe.json                   # coefficients: [E numbers], or a recipe's

Paths are read from the folder of the file.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from soup_jax import inputs, remote
from soup_jax import storage as files
from soup_jax.errors import UserError
from soup_jax.specialists import export
from soup_jax.specialists.trained import METHODS

_ORIGINS = ("documents", "text", "h", "alpha", "blend")
_KEYS = (*_ORIGINS, "without", "method", "formats")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_SPECIALISTS = 10_000
_MAX_FILE_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One specialist of the file; exactly one of `documents` to `blend` is given.

    Attributes:
      without: domains that get no weight. The shared parameters and the experts were trained on
        them all the same.
      method: of `documents` and `text`, one of `trained.METHODS`.
    """

    name: str
    documents: tuple[str, ...] = ()
    text: str = ""
    h: Any = None
    alpha: Any = None
    blend: Mapping[str, float] | None = None
    without: tuple[int, ...] = ()
    method: str = "auto"
    formats: tuple[str, ...] = ()


class _Loader(yaml.SafeLoader):
    # YAML's own takes the last of two equal keys without a word.
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in found:
            if found.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


def read_entries(path: str | pathlib.Path) -> list[Entry]:
    """The entries of a YAML file.

    Raises:
      UserError: says which entry and key is wrong, and how.
    """
    path = pathlib.Path(path)
    text = inputs.read_text(path, limit=_MAX_FILE_BYTES)
    if "&" in text and "*" in text and re.search(r"(^|[\s\[,:])\*[A-Za-z]", text):
        raise UserError(f"{path}: aliases (*name) are not read here: write the values out")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())[:300]}") from e
    if not isinstance(value, dict) or not isinstance(value.get("specialists"), dict):
        raise UserError(f"{path} must have a mapping `specialists`, from names to what they are of")
    if unknown := sorted(map(str, value.keys() - {"specialists", "defaults"})):
        raise UserError(f"{path}: unknown keys {', '.join(unknown)}: specialists, defaults")
    defaults = value.get("defaults") or {}
    _check_keys(defaults, f"{path}: defaults", ("method", "formats", "without"))
    named = value["specialists"]
    if not 0 < len(named) <= _MAX_SPECIALISTS:
        raise UserError(f"{path} has {len(named)} specialists, not 1 to {_MAX_SPECIALISTS:,}")
    entries = [_entry(path, name, {**defaults, **(given or {})}) for name, given in named.items()]
    folded = [entry.name.lower() for entry in entries]
    for entry in entries:
        if folded.count(entry.name.lower()) > 1:
            raise UserError(f"{path}: two specialists are named {entry.name!r}, but for case")
        for other in entry.blend or ():
            if other not in named or other == entry.name or (named[other] or {}).get("blend"):
                raise UserError(
                    f"{path}: {entry.name}: blend: {other!r} is no other specialist of this file "
                    "that is not itself a blend"
                )
    return entries


def _check_keys(given: Any, where: str, known: Sequence[str]) -> None:
    if not isinstance(given, dict):
        raise UserError(f"{where} must be a mapping of {', '.join(known)}")
    if unknown := [str(key) for key in given if key not in known]:
        raise UserError(f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(known)}")


def _entry(path: pathlib.Path, name: Any, given: Any) -> Entry:
    where = f"{path}: {name}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"{where}: a name is a folder's: letters, digits, '.', '_' and '-', quoted if it is a "
            "number"
        )
    _check_keys(given, where, _KEYS)
    origins = [key for key in _ORIGINS if given.get(key) is not None]
    if len(origins) != 1:
        raise UserError(
            f"{where} needs exactly one of {', '.join(_ORIGINS)}; it has "
            f"{' and '.join(origins) or 'none'}"
        )
    fields: dict[str, Any] = dict(given)
    for key in ("documents", "formats", "without"):
        found = fields.get(key, ())
        found = [found] if isinstance(found, str | int) else found
        kind = int if key == "without" else str
        if not isinstance(found, list | tuple) or not all(type(x) is kind for x in found):
            raise UserError(f"{where}: {key} must be a list of {kind.__name__}")
        fields[key] = tuple(found)
    for document in fields["documents"]:
        files.refuse_address(document, f"{where}: documents", objects=True)
    fields["documents"] = tuple(
        d if remote.is_object(d) else str(path.parent / d) for d in fields["documents"]
    )
    if not isinstance(fields.get("text") or "", str):
        raise UserError(f"{where}: text must be a text")
    if fields.setdefault("method", "auto") not in METHODS:
        raise UserError(f"{where}: method {fields['method']!r} is none of {', '.join(METHODS)}")
    if origins[0] in ("h", "alpha", "blend"):
        fields["method"] = "histogram"  # a default is for those with documents
    for name_ in fields["formats"]:
        export.FORMATS.get(name_)
    for key in ("h", "alpha"):
        if isinstance(fields.get(key), str):
            fields[key] = path.parent / fields[key]
    if fields["without"] and origins[0] == "alpha":
        raise UserError(f"{where}: `without` is of domain weights, and alpha has none")
    blend = fields.get("blend")
    if blend is not None and not (
        isinstance(blend, dict) and blend and all(_positive(x) for x in blend.values())
    ):
        raise UserError(f"{where}: blend must map names to weights above 0")
    fields["text"] = fields.get("text") or ""
    return Entry(name=name, **fields)


def _positive(x: Any) -> bool:
    return type(x) in (int, float) and 0 < x < float("inf")
