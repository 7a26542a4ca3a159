"""The letter legend of the project, type aliases, and the check that turns names into contracts.

A tensor's name ends in its shape, and that suffix is also its einsum string:

    B batch (windows per step)   L sequence length   D model dimension   H attention heads
    F MLP hidden dimension       V vocabulary        N layers            E experts
    K domains                    M mixtures (domain-weight vectors per step)

`alpha_ME` has one row of E coefficients per mixture; `h_MK` one row of K domain weights.
"""

from collections.abc import Mapping
from typing import Any

import jax

Array = jax.Array
# A nested dict of arrays: what `Module.init(...)["params"]` returns.
Params = Mapping[str, Any]


def check_shapes(**arrays: Any) -> dict[str, int]:
    """Check arrays against the letters that end their names; return the size of each letter.

    `check_shapes(alpha_ME=alpha, h_MK=h)` needs two dimensions each and one common M.

    Raises:
      ValueError: a wrong number of dimensions, or two sizes for one letter.
    """
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        letters = name.rsplit("_", 1)[-1]
        if len(array.shape) != len(letters):
            raise ValueError(
                f"{name} has shape {tuple(array.shape)}, expected dimensions {letters}"
            )
        for letter, size in zip(letters, array.shape):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{name} has {letter}={size}, but {letter}={sizes[letter]} elsewhere"
                )
    return sizes
