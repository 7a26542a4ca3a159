"""Names in a config that stand for code: one of ours, or a dotted path to yours.

A dotted path is `package.module:attribute`. The module is one that Python finds, or lies in the
folder that the command runs in; installed modules come first.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from soup_jax.errors import UserError


def find(name: str, known: Mapping[str, str], *, field: str) -> Callable[..., Any]:
    """The function that `name` stands for.

    Args:
      name: a key of `known`, or a dotted path.
      known: dotted paths of ours by name; a module is imported when its name is asked for.
      field: what holds the name, for messages.

    Raises:
      UserError: neither a known name nor a dotted path; no such module or attribute; not callable.
    """
    module, colon, attribute = known.get(name, name).partition(":")
    if not (module and colon and attribute):
        close = difflib.get_close_matches(name, known, n=1)
        raise UserError(
            f"{field} = {name!r} is none of {sorted(known)}"
            + (f" (did you mean {close[0]}?)" if close else "")
            + " and no dotted path such as 'my_package.my_module:make'"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look here by itself
    try:
        found = importlib.import_module(module)
    except ImportError as e:
        raise UserError(
            f"{field} = {name!r}: {module} cannot be imported: {e}. It must be installed, or lie "
            f"in the current folder, {os.getcwd()}"
        ) from e
    function = getattr(found, attribute, None)
    if not callable(function):
        what = "is no function" if hasattr(found, attribute) else "does not exist"
        raise UserError(f"{field} = {name!r}: {attribute} {what} in {found.__file__}")
    return function
