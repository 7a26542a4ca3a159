"""The slicing rule, what it reports, and the hops between storage and compute layout."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from soup_jax.soup import layout as sharding
from soup_jax.training import build


def make(replica: int, fsdp: int) -> jax.sharding.Mesh:
    cfg = tiny_config(
        **{"num_mixtures": 8, "batch_size": 64, "mesh.replica": replica, "mesh.fsdp": fsdp}
    )
    return build.make_mesh(cfg, jax.devices()[: replica * fsdp])


@pytest.mark.parametrize(
    ("shape", "replica", "fsdp", "spec"),
    [
        ((12, 64, 192), 2, 4, P(None, None, ("fsdp", "replica"))),  # the largest that divides
        ((64, 64), 2, 4, P(("fsdp", "replica"))),  # the first of equal ones
        ((3, 100, 24), 2, 4, P(None, None, ("fsdp", "replica"))),  # 100 does not divide by 8
        ((3, 100, 22), 2, 4, P(None, "fsdp", "replica")),  # one axis each
        ((2, 3, 20), 2, 4, P("replica", None, "fsdp")),
        ((3, 5, 20), 2, 4, P(None, None, "fsdp")),  # only one fits, the longer axis
        ((3, 5, 22), 2, 4, P(None, None, "replica")),  # only the shorter one divides
        ((3, 5, 7), 2, 4, P()),
        ((64,), 8, 1, P("replica")),
        ((64,), 1, 8, P("fsdp")),
        ((64,), 1, 1, P()),
        ((), 2, 4, P()),
    ],
)
def test_rule(shape, replica, fsdp, spec):
    m = make(replica, fsdp)
    assert sharding.slice_spec(shape, m) == spec
    # Experts or mixtures in front are never cut.
    assert sharding.slice_spec((16, *shape), m, leading=1) == (P(None, *spec) if spec else P())
    jax.device_put(jnp.zeros(shape), NamedSharding(m, spec))  # jax accepts it


def test_large_leaves_with_copies_are_reported():
    m = make(2, 4)

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, np.float32)

    tree = {
        "cut": leaf(8, 1 << 20),
        "two": leaf(100, 22, 1000),
        "half": leaf(5, 1, (1 << 21) + 2),
        "whole": leaf(7, 1, (1 << 20) + 1),
        "small": leaf(7, 3),
    }
    lines = sharding.unsliced(m, tree)
    assert len(lines) == 2
    assert re.match(r"half .* 21\.\d MB on every device, 4 copies", lines[0])
    assert re.match(r"whole .* 29\.\d MB on every device, 8 copies", lines[1])
    assert not sharding.unsliced(make(1, 1), tree)


@pytest.mark.parametrize("shape", [(8, 16, 24), (8, 100, 22), (8, 5, 20), (8, 5, 7)])
@pytest.mark.parametrize(("replica", "fsdp"), [(8, 1), (4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("gather", [True, False])
def test_to_groups_and_back_keep_the_values(shape, replica, fsdp, gather):
    m = make(replica, fsdp)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    stored = NamedSharding(m, sharding.slice_spec(shape, m, leading=1))

    @jax.jit
    def there_and_back(y):
        groups = sharding.to_groups(m, y, gather=gather)
        return groups, sharding.to_slices(m, groups, gather=gather)

    groups, back = there_and_back(jax.device_put(x, stored))
    np.testing.assert_array_equal(groups, x)
    np.testing.assert_array_equal(back, x)
    # A device holds the mixtures of its group, whole or one of `fsdp` slices.
    sizes = {s.data.shape[0] for s in groups.addressable_shards}
    assert sizes == {8 // replica}
    axes = [a for axes in sharding.slice_dims(shape[1:], m).values() for a in axes]
    cut = fsdp if not gather and "fsdp" in axes else 1
    assert {s.data.size for s in groups.addressable_shards} == {x.size // replica // cut}
    assert back.sharding.is_equivalent_to(stored, back.ndim)
