"""The rules that a leaf of the base network can have in `experts.rules`.

- "dense": an expert has a full copy of the leaf.
- "low_rank:R": an expert's part of the matrix is a product of two factors of rank R.
- "none": no experts; the leaf is shared by all mixtures.
"""

import difflib
import re

from soup_jax.errors import UserError


def is_matrix(path: str, ndim: int) -> bool:
    """Whether a leaf is a matrix or a stack of them; norm scales and biases are not.

    A stacked norm scale is two-dimensional, so the name decides for it.
    """
    return ndim >= 2 and not re.search(r"norm/scale$|bias$", path)


def low_rank(rule: str) -> int | None:
    """R of "low_rank:R"; None of "dense" and "none".

    Raises:
      UserError: anything else, with the nearest valid rule.
    """
    if rule in ("dense", "none"):
        return None
    if match := re.fullmatch(r"low_rank:([1-9][0-9]*)", rule):
        return int(match[1])
    word = "_".join(re.findall("[a-z]+", rule.lower()))
    number = re.search("[1-9][0-9]*", rule)
    forms = {"dense": "dense", "none": "none", "low_rank": f"low_rank:{number[0] if number else 8}"}
    close = difflib.get_close_matches(word, forms, n=1, cutoff=0.5)
    hint = f" (did you mean {forms[close[0]]!r}?)" if close else ""
    raise UserError(
        f"{rule!r} is no rule for experts{hint}; rules are 'dense', 'none' and 'low_rank:R', with "
        "a rank R of at least 1"
    )
