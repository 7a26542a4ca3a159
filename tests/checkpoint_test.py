"""Checkpoints: other topologies, damage, mismatch, the keep policy and donated buffers."""

import errno
import logging
import os
import pathlib
import shutil
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import tiny_config
from step_test import make, make_batch

from soup_jax import tree
from soup_jax.errors import UnavailableError, UserError
from soup_jax.processes.group import Solo
from soup_jax.training import checkpoint, echoes
from soup_jax.training.checkpoint import Checkpointer


def trained(num_devices=8, steps=2, **fields):
    cfg, m, state, step, sums = make(num_devices, **fields)
    for i in range(steps):
        state, sums = step(state, sums, make_batch(cfg, m, i))
    return cfg, m, state, step, sums


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def copied(state):
    # np.array copies: a view of a CPU buffer would change with it.
    return jax.tree.map(np.array, {"params": state.params, "opt_state": state.opt_state})


def assert_equal(got, want):
    got, want = tree.flatten(got), tree.flatten(want)
    assert got.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(value), err_msg=path)


def save(directory, cfg, state, *steps):
    with Checkpointer(directory, cfg) as checkpointer:
        for step in steps:
            checkpointer.save(state, {"step": step, "note": f"of {step}"})
            checkpointer.wait()
        return checkpointer.steps()


@pytest.mark.parametrize("bank", ["merged", pytest.param("adamw", marks=pytest.mark.slow)])
def test_restored_on_other_device_counts_and_back_exactly(bank, tmp_path):
    fields = {"optimizer.bank": bank}
    cfg, _, state, _, _ = trained(8, **fields)
    want = copied(state)
    for i, num_devices in enumerate((4, 2, 1, 8)):
        save(tmp_path / str(i), cfg, state, 2)
        _, m, other, _, _ = make(num_devices, **fields)
        with Checkpointer(tmp_path / str(i)) as reader:
            state, data = reader.restore(abstract(other))
        assert (data["step"], data["note"]) == (2, "of 2")
        assert_equal(copied(state), want)
        assert (int(state.step), int(state.bad_step)) == (2, -1)
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other)):
            assert x.dtype == y.dtype
            assert x.sharding == y.sharding
        assert {d for x in jax.tree.leaves(state.params) for d in x.devices()} == set(
            m.devices.flat
        )


def test_reads_that_outlive_a_failed_one_print_nothing(capsys, caplog, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    echoes.drop.__wrapped__()

    def unraisable(text, object=None):
        error = RuntimeError(text)
        return SimpleNamespace(
            exc_type=type(error), exc_value=error, exc_traceback=None, err_msg=None, object=object
        )

    sys.unraisablehook(unraisable("Event loop is closed"))
    code = SimpleNamespace(co_filename="lib/orbax/checkpoint/serialization.py")
    sys.unraisablehook(unraisable("a part of an array", SimpleNamespace(cr_code=code)))
    assert capsys.readouterr().err == ""
    for text in ("Task exception was never retrieved: [tensorstore_spec='{}']", "Task of another"):
        logging.getLogger("asyncio").error(text)
    assert [r.getMessage() for r in caplog.records] == ["Task of another"]
    with pytest.raises(TypeError):  # Python's own hook, which takes no stand-in, has got it
        sys.unraisablehook(unraisable("another"))


def test_parameters_are_read_without_the_optimizer(tmp_path):
    cfg, _, state, _, _ = trained()
    save(tmp_path, cfg, state, 2, 4)
    for step in (2, 4):
        shutil.rmtree(tmp_path / str(step) / "opt_state")
    with Checkpointer(tmp_path) as reader:
        params, step = reader.restore_params(abstract(state).params)
        assert step == 4
        assert_equal(params, state.params)
        assert reader.restore_params(abstract(state).params, step=2)[1] == 2
        with pytest.raises(UserError, match=r"no checkpoint of step 3, only \[2, 4\]"):
            reader.restore_params(abstract(state).params, step=3)


def test_another_structure_is_refused_leaf_by_leaf(tmp_path):
    cfg, _, state, _, _ = trained(num_experts=4)
    save(tmp_path, cfg, state, 2)
    _, _, wider, _, _ = make(num_experts=3)
    _, _, other_bank, _, _ = make(**{"optimizer.bank": "adamw"})
    with Checkpointer(tmp_path) as reader:
        with pytest.raises(UserError, match="does not fit this config") as e:
            reader.restore(abstract(wider))
        lines = str(e.value).splitlines()[1:]
        bank = tree.flatten(wider.params["bank"])
        for path, leaf in bank.items():
            before = f"float32{[4, *leaf.shape[1:]]}"
            assert f"  params/bank/{path}: {before} -> float32{list(leaf.shape)}" in lines
        assert not any("params/shared" in line for line in lines)
        with pytest.raises(UserError, match=r"opt_state/bank/\S+: absent -> float32"):
            reader.restore(abstract(other_bank))
        reader.restore_params(abstract(other_bank).params)  # the parameters do fit


def garble(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\x00garbage" * 3)


def lose_arrays(folder):
    shutil.rmtree(folder / "params" / "d", ignore_errors=True)
    for path in (folder / "params").glob("*ocdbt*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGE = {
    "garbled": garble,
    "arrays lost": lose_arrays,
    "params lost": lambda folder: shutil.rmtree(folder / "params"),
    "optimizer lost": lambda folder: shutil.rmtree(folder / "opt_state"),
    "data lost": lambda folder: shutil.rmtree(folder / "data"),
}


# Whatever is lost is found in the same place; garbled bytes are found elsewhere.
QUICK = ("garbled", "data lost")


@pytest.mark.parametrize(
    "damage", [d if d in QUICK else pytest.param(d, marks=pytest.mark.slow) for d in DAMAGE]
)
def test_a_damaged_newest_checkpoint_is_skipped_and_then_replaced(damage, tmp_path):
    cfg, m, state, step, sums = trained(**{"checkpoint.keep_latest": 3})
    save(tmp_path, cfg, state, 2)
    want = copied(state)
    state, _ = step(state, sums, make_batch(cfg, m, 2))
    newest = copied(state)
    save(tmp_path, cfg, state, 8)
    DAMAGE[damage](tmp_path / "8")
    with Checkpointer(tmp_path, cfg) as checkpointer:
        restored, data = checkpointer.restore(abstract(state))
        assert data["step"] == 2
        assert_equal(copied(restored), want)
        # The run goes on from step 2: what it saves, before and at the damaged step, must count.
        for step_number in (5, 8):
            assert checkpointer.save(state, {"step": step_number})
            checkpointer.wait()
            restored, data = checkpointer.restore(abstract(state))
            assert data["step"] == step_number
            assert_equal(copied(restored), newest)
        assert not list(tmp_path.glob("unreadable_*"))  # the run is beyond what was set aside
    with Checkpointer(tmp_path) as reader:
        assert reader.restore(abstract(state))[1]["step"] == 8


def test_a_read_is_tried_again_and_its_error_is_short(monkeypatch):
    monkeypatch.setattr(checkpoint, "_RETRY_SECS", 0)
    left = [OSError("a passing fault")]

    def read(*_):
        if left:
            raise left.pop()
        return {"data": 1}

    monkeypatch.setattr(checkpoint, "_read_once", read)
    reader = SimpleNamespace(directory="run/checkpoints")
    assert checkpoint._read(reader, 3, {}) == ({"data": 1}, "")
    left += [OSError("the driver's own words\n" * 99)] * 2
    items, failure = checkpoint._read(reader, 3, {})
    assert items is None
    assert failure.startswith("OSError: the driver's own words the")
    assert len(failure) < 250
    # No damage, by which the one before would be taken: a bucket that does not answer.
    left += [ConnectionResetError("peer")]
    reader.directory = "gs://b/checkpoints"
    with pytest.raises(UnavailableError, match=r"^gs://b/checkpoints: no answer: peer$"):
        checkpoint._read(reader, 3, {})


def test_a_reader_skips_damage_and_leaves_the_folder_alone(tmp_path):
    cfg, _, state, _, _ = trained()
    save(tmp_path, cfg, state, 2, 4)
    garble(tmp_path / "4")
    before = sorted(tmp_path.rglob("*"))
    with Checkpointer(tmp_path) as reader:
        assert reader.restore_params(abstract(state).params)[1] == 2
        with pytest.raises(UserError, match=r"none of the checkpoints[\s\S]*step 4"):
            reader.restore_params(abstract(state).params, step=4)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_that_another_process_cannot_read_is_skipped_here_too(tmp_path, monkeypatch):
    cfg, _, state, _, _ = trained()
    save(tmp_path, cfg, state, 2, 4)
    told = {"checkpoint 4": ["process 1 (host, pid 7): failure = 'OSError', process 0: ''"]}
    monkeypatch.setattr(Solo, "meet", lambda _, name, facts, **__: (facts, told.get(name, [])))
    with Checkpointer(tmp_path) as reader:
        assert reader.restore(abstract(state))[1]["step"] == 2
        with pytest.raises(UserError, match=r"none of the[\s\S]*step 4: process 1 .*OSError"):
            reader.restore_params(abstract(state).params, step=4)


def test_only_damaged_checkpoints_are_an_error_that_names_each(tmp_path):
    cfg, _, state, _, _ = trained()
    save(tmp_path, cfg, state, 2, 4)
    for step in (2, 4):
        garble(tmp_path / str(step))
    with (
        Checkpointer(tmp_path, cfg) as checkpointer,
        pytest.raises(UserError, match=r"none of the[\s\S]*step 4: [\s\S]*step 2: "),
    ):
        checkpointer.restore(abstract(state))
    assert {"2", "4"} <= {p.name for p in tmp_path.iterdir()}


def test_keep_policy(tmp_path):
    cfg, _, state, _, _ = trained(**{"checkpoint.keep_latest": 2, "checkpoint.keep_every": 6})
    assert save(tmp_path, cfg, state, *range(2, 17, 2)) == [6, 12, 14, 16]
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"6", "12", "14", "16"}


def test_a_step_is_saved_once(tmp_path):
    cfg, _, state, _, _ = trained()
    with Checkpointer(tmp_path, cfg) as checkpointer:
        assert checkpointer.save(state, {"step": 2})
        checkpointer.wait()
        assert not checkpointer.save(state, {"step": 2})


def test_an_empty_folder_holds_nothing(tmp_path):
    cfg, _, state, _, _ = make()
    with Checkpointer(tmp_path / "new", cfg) as checkpointer:
        assert checkpointer.restore(abstract(state)) is None
        assert checkpointer.steps() == []
    no_checkpoint = pytest.raises(UserError, match=r"new holds no checkpoint; train first")
    with Checkpointer(tmp_path / "new") as reader, no_checkpoint:
        reader.restore_params(abstract(state).params)


def test_a_save_in_flight_is_not_changed_by_the_steps_after_it(tmp_path):
    cfg, m, state, step, sums = trained()
    batches = [make_batch(cfg, m, i) for i in range(6)]
    target, want = abstract(state), copied(state)
    with Checkpointer(tmp_path, cfg) as checkpointer:
        checkpointer.save(state, {"step": 2})
        for batch in batches:
            state, sums = step(state, sums, batch)
        jax.block_until_ready(state)
        checkpointer.wait()
        restored, _ = checkpointer.restore(target)
    assert_equal(copied(restored), want)
    moved = tree.flatten(state.params)
    assert any((np.asarray(moved[p]) != x).any() for p, x in tree.flatten(want["params"]).items())


def test_a_save_that_fails_does_not_hide_the_error_before_it(tmp_path, monkeypatch, caplog):
    cfg, *_ = trained(steps=0)

    def fails():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"), Checkpointer(tmp_path, cfg) as opened:
        monkeypatch.setattr(opened, "wait", fails)
    opened = Checkpointer(tmp_path, cfg)
    monkeypatch.setattr(opened, "wait", fails)
    first = RuntimeError("first")
    opened.__exit__(RuntimeError, first, None)  # so that the block raises `first`
    assert "and the save under way failed: the disk is full" in caplog.text


def test_whether_a_step_is_saved_is_no_question_of_a_listing(tmp_path, monkeypatch):
    # On shared storage each process may see another one, and a save is a collective.
    cfg, _, state, _, _ = trained(steps=0)
    with Checkpointer(tmp_path, cfg) as checkpointer:
        assert checkpointer.save(state, {"step": 2})
        checkpointer.wait()
    with Checkpointer(tmp_path, cfg) as checkpointer:
        checkpointer.restore(abstract(state))
        monkeypatch.setattr(checkpointer._manager, "all_steps", list)
        assert not checkpointer.save(state, {"step": 2})
        assert checkpointer.save(state, {"step": 4})
        assert not checkpointer.save(state, {"step": 4})


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_checkpoints_at_an_address_are_no_folder_here(kind, monkeypatch):
    opened = []
    monkeypatch.setattr(Checkpointer, "_open", lambda self, _: opened.append(self.directory))
    Checkpointer(kind("gs://b/run/checkpoints"), tiny_config())
    assert str(opened[0]) == "gs://b/run/checkpoints"  # of gs:/ orbax would make a folder gs:
