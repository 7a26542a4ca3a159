"""Checkpoints of a run: orbax, asynchronous, parameters, optimizer and data state as three items.

    checkpoints/<step>/params      the soup; all that instantiating a specialist reads
    checkpoints/<step>/opt_state   optimizer state
    checkpoints/<step>/data        JSON: format, step, plan cursors, fingerprint, checksums, a seal

`step` counts the updates already applied. A restore builds its target from the config and the mesh
at hand, so a checkpoint of one topology is read on any other; the structure is compared first and
a difference is printed leaf by leaf. What was read is compared with the checksums of what was
saved. A newest checkpoint that cannot be read, twice, or differs is skipped, with a message, for
the one before; a run that goes on from there first renames it to unreadable_<step>, since it would
be taken for a later save of its own. A later start deletes it, once the run is past that step.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from soup_jax import places, remote, storage, tree
from soup_jax.errors import UnavailableError, UserError, explain
from soup_jax.inputs import check_structure, read_format
from soup_jax.processes import start as distributed
from soup_jax.training import echoes, formats, integrity
from soup_jax.training.state import TrainState

_SAVED = ". What was saved before stays, and the same command goes on from it"
TRYING = "unreadable checkpoint, trying the one before: %s"
_log = logging.getLogger(__name__)

_ARRAYS = ("params", "opt_state")
# Between two tries to read: a network file system may fail for a moment.
_RETRY_SECS = 1.0
_DATA = {
    "step": int,
    "fingerprint?": {"corpus": str},
    "cursors?": [int],
    "plan_step?": int,
    "evaluation_due?": bool,
    "checksums?": {...: str},
}


class Checkpointer:
    """Saves and restores the train state of one run; close it, or use it as a context."""

    def __init__(self, directory: epath.PathLike, cfg: ConfigDict | None = None):
        """`cfg` gives the keep policy and time-out; without it the checkpoints are only read."""
        if cfg is None:
            options = ocp.CheckpointManagerOptions(
                read_only=True, save_interval_steps=0, create=False
            )
        else:
            keep = [checkpoint_managers.LatestN(cfg.checkpoint.keep_latest)]
            if cfg.checkpoint.keep_every:
                keep.append(checkpoint_managers.EveryNSteps(cfg.checkpoint.keep_every))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
                async_options=ocp.AsyncOptions(timeout_secs=cfg.checkpoint.async_timeout_secs),
            )
        echoes.drop()
        path = epath.Path(remote.spelled(directory))  # pathlib's gs:/ would be a folder here
        self.directory = path if remote.is_object(path) else path.absolute()
        self._group = distributed.current()
        self._timeout = 300.0 if cfg is None else cfg.checkpoint.async_timeout_secs
        self._read_only = cfg is None
        self._last = -1  # the newest step restored or saved
        self._manager = self._open(options)

    def _open(self, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
        handlers = {name: ocp.StandardCheckpointHandler() for name in _ARRAYS}
        with remote.reached(self.directory):
            return ocp.CheckpointManager(
                self.directory,
                options=options,
                item_handlers={**handlers, "data": ocp.JsonCheckpointHandler()},
            )

    @contextlib.contextmanager
    def _reader(self) -> Iterator[ocp.CheckpointManager]:
        # With many processes each reads on its own: inside orbax's barriers, one that finds its
        # part damaged would leave the others waiting. What to take is agreed on by the group.
        if self._group.num_processes == 1:
            yield self._manager
            return
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader_{me}"
        )
        reader = self._open(
            ocp.CheckpointManagerOptions(
                read_only=True, save_interval_steps=0, create=False, multiprocessing_options=alone
            )
        )
        try:
            yield reader
        finally:
            reader.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
        try:
            self.close()  # before other processes hear of an error: they save with this one
        except Exception as e:
            if error is None:
                raise
            _log.error("%s, and the save under way failed: %s", kind.__name__, explain(e) or e)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: Mapping[str, Any]) -> bool:
        """Start a save of `state` at its step; False if that step is saved already.

        Returns as soon as the arrays may be donated; an earlier save that failed raises here.
        """
        with remote.reached(self.directory, _SAVED):
            self._manager.check_for_errors()
        step = int(data["step"])
        if step <= self._last:  # not by a listing: each process may see another
            return False
        self._last = step
        params, opt_state = state.params, state.opt_state
        if jax.default_backend() == "cpu":
            # On CPU the "device to host copy" is a view of the buffer that the next step donates.
            # Copies that are sent while a step of many simulated devices still runs take the
            # threads that its collectives wait for: XLA aborts the process after 40 s.
            jax.block_until_ready((params, opt_state))
            params, opt_state = jax.tree.map(jnp.copy, (params, opt_state))
            jax.block_until_ready((params, opt_state))
        data = {"format": formats.CHECKPOINT, **data}
        data["checksums"] = integrity.checksums({"params": params, "opt_state": opt_state})
        data = storage.sealed(json.loads(storage.json_text(data)))  # as it will be read
        chunks = tree.map_named(formats.chunks, params)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params, save_args=chunks),
            opt_state=ocp.args.StandardSave(opt_state),
            data=ocp.args.JsonSave(data),
        )
        with remote.reached(self.directory, _SAVED):
            self._manager.save(step, args=items)
        return True

    def wait(self) -> None:
        """Block until the save in flight is durable; raises if it failed."""
        with remote.reached(self.directory, _SAVED):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait for the save in flight and release the manager."""
        self.wait()
        with remote.reached(self.directory):
            self._manager.close()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, data) of the newest readable checkpoint, or None if there is none.

        Args:
          abstract: ShapeDtypeStructs with the shardings that the arrays shall have.

        Raises:
          UserError: the newest checkpoint has another structure than `abstract`, or none of the
            checkpoints can be read.
        """
        target = {"params": abstract.params, "opt_state": abstract.opt_state}
        result = self._newest(target, step=None)
        if result is None:
            return None
        step, items = result
        self._last = step
        if not self._read_only:
            with remote.reached(self.directory):
                self._set_aside(step)
        state = TrainState(
            params=items["params"],
            opt_state=items["opt_state"],
            step=_scalar(step, abstract.step),
            bad_step=_scalar(-1, abstract.bad_step),
        )
        return state, items["data"]

    def restore_params(self, abstract: Any, *, step: int | None = None) -> tuple[Any, int]:
        """(params, step) of the newest readable checkpoint, or of `step`; no optimizer is read.

        Raises:
          UserError: no checkpoint, none of that step, or another structure than `abstract`.
        """
        result = self._newest({"params": abstract}, step=step)
        if result is None:
            raise self.none(None)
        return result[1]["params"], result[0]

    def data(self, step: int) -> dict[str, Any]:
        """The data item of a checkpoint."""
        args = ocp.args.Composite(data=ocp.args.JsonRestore())
        with remote.reached(self.directory):
            return self._manager.restore(step, args=args)["data"]

    def verify(self) -> dict[int, tuple[str, str]]:
        """By step: (what is damaged, what was compared), of all that a checkpoint holds."""
        return {step: self._verify(step) for step in self.steps()}

    def _verify(self, step: int) -> tuple[str, str]:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        try:
            data = self.data(step)
            check_data(data, step, f"{self.directory}/{step}")
            saved, found = data.get("checksums"), []
            for name in _ARRAYS:
                target = jax.tree.map(
                    lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here),
                    dict(self._manager.item_metadata(step)[name]),
                )
                args = ocp.args.Composite(**{name: ocp.args.StandardRestore(target)})
                with remote.reached(self.directory):
                    items = {name: self._manager.restore(step, args=args)[name]}
                found += integrity.differences(saved or {}, items)
        except UnavailableError:
            raise
        except Exception as e:
            return " ".join(f"{type(e).__name__}: {e}".split())[:300], ""
        if found:
            return f"changed since it was saved: {', '.join(found[:5])}", ""
        if saved is None:
            return "", "can be read; an earlier version saved it, without checksums"
        return "", f"{len(saved)} arrays as they were saved"

    def _set_aside(self, last: int) -> None:
        # Left in place, orbax would refuse to save at or before these later steps.
        if self._group.process_id == 0:
            with contextlib.suppress(OSError):
                for old in self.directory.glob("unreadable_*"):
                    if int(old.name.removeprefix("unreadable_")) <= last:
                        old.rmtree()
        steps = [s for s in self._agreed(self.steps()) if s > last]
        if not steps:
            return
        self._group.meet("checkpoints read")
        if self._group.process_id == 0:
            for step in steps:
                aside = self.directory / f"unreadable_{step}"
                aside.rmtree(missing_ok=True)
                places.move(self.directory / str(step), aside)
        self._group.meet("unreadable checkpoints set aside")
        self._manager.reload()

    def _newest(self, target: Mapping[str, Any], *, step: int | None) -> Any:
        steps = self.steps()
        if step is not None and step not in steps:
            raise self.none(step)
        candidates = [step] if step is not None else steps[::-1]
        with self._reader() as reader:
            return self._newest_of(self._agreed(candidates), target, reader)

    def _agreed(self, steps: list[int]) -> list[int]:
        # The folder may look older on another machine; process 0 has written it.
        lead, _ = self._group.meet("checkpoints", {"steps": steps}, timeout=self._timeout)
        return lead["steps"]

    def _newest_of(
        self, candidates: list[int], target: Mapping[str, Any], reader: ocp.CheckpointManager
    ) -> Any:
        failures = []
        for candidate in candidates:
            items, failure = _read(reader, candidate, target)
            _, differences = self._group.meet(
                f"checkpoint {candidate}", {"failure": failure}, timeout=self._timeout
            )
            if isinstance(items, list):
                raise self.misfit(candidate, items)
            if not failure and not differences:
                # By all processes, for each has a part of the arrays.
                changed = integrity.differences(
                    items["data"].get("checksums", {}), {name: items[name] for name in target}
                )
                if not changed:
                    return candidate, items
                failure = f"changed since it was saved: {', '.join(changed[:5])}"
            failures.append(f"step {candidate}: {failure or '; '.join(differences)}")
            _log.warning(TRYING, failures[-1])
        if failures:
            raise self.unreadable(failures)
        return None

    def none(self, step: int | None) -> UserError:
        """That there is no checkpoint, or none of this step."""
        if step is None or not self.steps():
            return UserError(f"{self.directory} holds no checkpoint; train first")
        steps = self.steps()
        return UserError(f"{self.directory} holds no checkpoint of step {step}, only {steps}")

    def misfit(self, step: int, problems: list[str]) -> UserError:
        """That a checkpoint has another structure."""
        return UserError(
            f"checkpoint {self.directory}/{step} does not fit this config (checkpoint -> config):"
            "\n  " + "\n  ".join(problems)
        )

    def unreadable(self, failures: list[str]) -> UserError:
        """That none can be read, and why."""
        return UserError(
            f"none of the checkpoints in {self.directory} can be read:\n  " + "\n  ".join(failures)
        )


def _read(reader: ocp.CheckpointManager, step: int, target: Mapping[str, Any]) -> tuple[Any, str]:
    # (items, "") or, for another structure, (its differences, ""), or (None, what is damaged). A
    # damaged checkpoint fails in many ways; all of them are told.
    failure = ""
    for attempt in range(2):
        if attempt:
            time.sleep(_RETRY_SECS)
        try:
            with remote.reached(reader.directory):
                return _read_once(reader, step, target), ""
        except UserError:
            # Sound, but of a later version, or out of reach: one before it is no continuation.
            raise
        except _Damaged as e:
            return None, str(e)
        except Exception as e:
            failure = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    return None, failure


class _Damaged(Exception):
    """A checkpoint that will not be sound if it is read again."""


def _read_once(reader: ocp.CheckpointManager, step: int, target: Mapping[str, Any]) -> Any:
    data = reader.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
    version = check_data(data, step, f"checkpoint {reader.directory}/{step}")
    stored = formats.to_v1(target) if version == 1 else target
    problems = _structure_diff(reader.item_metadata(step), stored)
    if problems:
        return problems
    args = {name: ocp.args.StandardRestore(value) for name, value in stored.items()}
    items = dict(reader.restore(step, args=ocp.args.Composite(**args)).items())
    if version == 1:
        items = formats.from_v1(items, target)
    return {**items, "data": data}


def check_data(data: Any, step: int, place: str) -> int:
    """The format of a data item. A later one is no damage: it may be of any structure."""
    if isinstance(data, dict):
        version = read_format(data, place, newest=formats.CHECKPOINT)
    try:
        check_structure(data, _DATA, "its data item")
    except UserError as e:
        raise _Damaged(str(e)) from e
    if "seal" in data and data != storage.sealed(data):
        raise _Damaged("its data item was changed since it was saved")
    if data["step"] != step:
        raise _Damaged(f"its data item is that of step {data['step']}: it was copied or renamed")
    return version


def _scalar(value: int, like: Any) -> jax.Array:
    return jax.make_array_from_callback((), like.sharding, lambda _: jnp.asarray(value, jnp.int32))


def _structure_diff(metadata: Any, target: Mapping[str, Any]) -> list[str]:
    lines = []
    for item, wanted in target.items():
        saved = metadata[item]
        if saved is None:
            raise FileNotFoundError(f"item {item!r} is missing")
        # Optax states are tuples; saved, their positions are keys. Both flatten to one path.
        have, want = tree.flatten(dict(saved)), tree.flatten(wanted)
        lines += [f"{item}/{line}" for line in tree.differences(have, want)]
    return lines
