"""Things that a config names: one of ours by a short name, anybody else's by a dotted path.

    EMBEDDERS = Registry("embedder", {"tfidf_svd": "soup_jax.data.embed.tfidf_svd:TfidfSvd"})
    EMBEDDERS.get("tfidf_svd")
    EMBEDDERS.get("my_package.embedders:Sentences")

Nothing is imported before it is asked for.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from soup_jax.errors import UserError

T = TypeVar("T")


def is_path(name: str) -> bool:
    """Whether the name is a dotted path `package.module:attribute`."""
    return ":" in name


def from_path(path: str) -> object:
    """What `package.module:attribute` names.

    Installed modules come first, then those in the current folder.

    Errors that the module itself raises pass through.

    Raises:
      UserError: not such a path, or there is no such module, or the module lacks the attribute.
    """
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in f"{module_name}.{attribute}".split(".")):
        raise UserError(f"{path!r} is no dotted path; write package.module:attribute")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # a console script does not look here by itself
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module_name}.".startswith(f"{e.name}."):
            raise
        raise UserError(
            f"{path}: there is no module {e.name} (install it, or start in its folder)"
        ) from e
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise UserError(f"{path}: the module {module_name} has no attribute {attribute}")
        found = getattr(found, name)
    return found


class Registry(Generic[T]):
    """One kind of thing, by name."""

    def __init__(self, kind: str, known: Mapping[str, "T | str"] | None = None):
        """`kind` is its noun in messages; `known` gives things, or dotted paths to them."""
        self.kind = kind
        self._known: dict[str, T | str] = dict(known or {})

    def names(self) -> tuple[str, ...]:
        """The known names, sorted."""
        return tuple(sorted(self._known))

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that makes a thing known by a name.

        Raises:
          ValueError: the name is taken, or looks like a dotted path.
        """
        if name in self._known or is_path(name):
            raise ValueError(f"{name!r} cannot be the name of another {self.kind}")

        def known(thing: T) -> T:
            self._known[name] = thing
            return thing

        return known

    def get(self, name: str) -> T:
        """What a name or a dotted path stands for.

        Raises:
          UserError: an unknown name (with the known ones and the nearest), or as `from_path`.
        """
        if is_path(name):
            return from_path(name)  # type: ignore[return-value]
        if name not in self._known:
            close = difflib.get_close_matches(name, self._known, n=1, cutoff=0.5)
            raise UserError(
                f"unknown {self.kind} {name!r}"
                + (f" (did you mean {close[0]}?)" if close else "")
                + f"; known are {', '.join(self.names())}, and anything of your own as "
                "package.module:attribute"
            )
        thing = self._known[name]
        return from_path(thing) if isinstance(thing, str) else thing  # type: ignore[return-value]
