"""Named leaves of nested dicts, first-match rules over the names, and sizes.

A leaf's name is its path joined by "/", as in "layers/attention/query". Nothing here knows what a
soup is; the functions take abstract leaves (`jax.ShapeDtypeStruct`) as well as arrays.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from soup_jax.errors import UserError


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path, in the order of the sorted nested keys."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose `flatten` is `leaves`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function gets the leaf's path first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(_name(path), *leaves), tree, *rest
    )


_NO_MATRIX = re.compile(
    r"(?:norm[^/]*|(?:^|/)ln(?:\d+|_[^/]*)?)/(?:scale|weight|gamma)$|bias$", re.IGNORECASE
)


def is_matrix(path: str, ndim: int) -> bool:
    """Whether a leaf is a matrix or a stack of them; norm scales and biases are not.

    A norm scale that is stacked by layer has two dimensions, so the name decides for it: "scale",
    "weight" or "gamma" of what is named norm, as in layer_norm, or ln, as in ln_1; and "bias".
    """
    return ndim >= 2 and not _NO_MATRIX.search(path)


def match_rules(rules: Sequence[tuple[str, str]], paths: Sequence[str]) -> dict[str, str]:
    """The rule of each path: that of the first (regex, rule) whose regex matches the whole path.

    Raises:
      UserError: a regex that does not compile, or a path that no regex matches.
    """
    return {path: rules[i][1] for path, i in _first_matches(rules, paths).items()}


def check_rules_used(rules: Sequence[tuple[str, str]], paths: Sequence[str]) -> None:
    """Refuse rules that do nothing; but ".*" at the end may be left over.

    Raises:
      UserError: as `match_rules`, or a regex that is no path's first match.
    """
    used = set(_first_matches(rules, paths).values())
    for i, pair in enumerate(rules):
        catch_all = i == len(rules) - 1 and pair[0] == ".*"
        if i not in used and not catch_all:
            raise UserError(
                f"the rule {pair!r} applies to no leaf: none has such a name, or rules "
                f"before it take all that have. The leaves are {', '.join(paths)}"
            )


def _first_matches(rules: Sequence[tuple[str, str]], paths: Sequence[str]) -> dict[str, int]:
    try:
        compiled = [re.compile(pattern) for pattern, _ in rules]
    except re.error as e:
        raise UserError(
            f"rules {list(rules)}: {e.pattern!r} is not a regular expression: {e}"
        ) from e
    matched = {}
    for path in paths:
        found = next((i for i, pattern in enumerate(compiled) if pattern.fullmatch(path)), None)
        if found is None:
            raise UserError(
                f"no rule matches the leaf {path!r}; the rules are {list(rules)}. "
                "Every leaf must be covered: end the list with ('.*', 'none') or ('.*', 'dense')"
            )
        matched[path] = found
    return matched


def num_params(tree: Any) -> int:
    """Number of scalars in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def differences(have: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    """`path: left -> right` for leaves, by path, whose shape or dtype is not the same."""

    def described(leaf: Any) -> str:
        return "absent" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"

    paths = sorted({*have, *want})
    pairs = {path: (described(have.get(path)), described(want.get(path))) for path in paths}
    return [f"{path}: {a} -> {b}" for path, (a, b) in pairs.items() if a != b]
