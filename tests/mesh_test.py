import jax
import pytest
from conftest import tiny_config

from soup_jax.errors import UserError
from soup_jax.hardware import mesh
from soup_jax.training import build


def shape(**fields):
    return dict(build.make_mesh(tiny_config(**fields)).shape)


@pytest.mark.parametrize(
    ("num_mixtures", "expected"),
    [(1, (1, 8)), (2, (2, 4)), (4, (4, 2)), (8, (8, 1)), (16, (8, 1))],
)
def test_replicas_hold_different_mixtures(num_mixtures, expected):
    found = shape(num_mixtures=num_mixtures, batch_size=16)
    assert (found["replica"], found["fsdp"]) == expected


def test_chips_that_fit_no_torus_keep_their_order_and_are_told(monkeypatch, caplog):
    class Chip:
        platform = "tpu"

    def refuse(*_, **__):
        raise NotImplementedError("no assignment")

    monkeypatch.setattr(mesh.mesh_utils, "create_device_mesh", refuse)
    chips = [Chip() for _ in range(6)]
    assert mesh._arranged(chips, 3, 2).ravel().tolist() == chips
    assert "groups of mesh.fsdp = 2 devices do not lie along links" in caplog.text


def test_without_experts_all_devices_share_one_model():
    assert shape(num_experts=0) == {"replica": 1, "fsdp": 8}


def test_sizes_can_be_given():
    assert shape(**{"mesh.replica": 1}) == {"replica": 1, "fsdp": 8}
    assert shape(**{"mesh.fsdp": 8}) == {"replica": 1, "fsdp": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh.replica": 3}, "is not the device count 8"),
        ({"mesh.replica": 8, "mesh.fsdp": 1}, "2 mixtures do not divide over mesh.replica = 8"),
        ({"mesh.platform": "tpu"}, "mesh.platform = 'tpu', but jax found 'cpu'"),
        ({"mesh.num_devices": 4}, "mesh.num_devices = 4, but jax found 8"),
        ({"batch_size": 4}, "2 rows of a micro-batch of one mixture .* mesh.fsdp = 4"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        build.make_mesh(tiny_config(**fields))


def test_device_table_counts_devices_by_process():
    assert mesh.device_table(jax.devices()) == "  process 0: 8 x cpu (cpu)"
