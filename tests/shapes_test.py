import numpy as np
import pytest

from soup_jax.shapes import check_shapes


def test_returns_the_size_of_each_letter():
    sizes = check_shapes(alpha_ME=np.zeros((2, 8)), h_MK=np.zeros((2, 5)))
    assert sizes == {"M": 2, "E": 8, "K": 5}


def test_refuses_two_sizes_of_one_letter():
    with pytest.raises(ValueError, match="M=3, but M=2"):
        check_shapes(alpha_ME=np.zeros((2, 8)), h_MK=np.zeros((3, 5)))


def test_refuses_a_wrong_number_of_dimensions():
    with pytest.raises(ValueError, match="h_MK has shape"):
        check_shapes(h_MK=np.zeros(5))
