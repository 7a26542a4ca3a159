"""The parameters in a checkpoint, read by rows, without the rest of it in memory."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from soup_jax import remote, tree
from soup_jax.errors import DamagedError, UnavailableError, UserError
from soup_jax.training import formats
from soup_jax.training.checkpoint import TRYING, Checkpointer, check_data

_log = logging.getLogger(__name__)


class CheckpointArrays:
    """The item "params" of a checkpoint that orbax wrote: an OCDBT store of Zarr arrays."""

    def __init__(self, folder: epath.Path, data: Mapping[str, Any], params: Any):
        """Opens the arrays; reads none.

        Args:
          folder: of the step.
          data: the checkpoint's data item.
          params: abstract, as the run's config wants them.
        """
        import tensorstore

        self.where = f"{folder}/params"
        named = {"params": tree.map_named(lambda path, _: path, params)}
        stored = formats.to_v1(named) if data.get("format", 1) == 1 else named
        opening = {
            name: tensorstore.open(
                {
                    "driver": "zarr",
                    "kvstore": {"driver": "ocdbt", "base": _url(folder / "params")},
                    "path": path.replace("/", ".") + "/",
                    # A finished checkpoint changes no more: a bucket need not be asked each time.
                    "recheck_cached_metadata": "open",
                    "recheck_cached_data": "open",
                },
                read=True,
                open=True,
            )
            for path, name in tree.flatten(stored["params"]).items()
        }
        with remote.reached(folder):
            self._arrays: dict[str, Any] = {name: f.result() for name, f in opening.items()}
        self.shapes: Mapping[str, jax.ShapeDtypeStruct] = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype.numpy_dtype)
            for name, a in self._arrays.items()
        }
        self.checksums: Mapping[str, str] = {
            path.removeprefix("params/"): value
            for path, value in data.get("checksums", {}).items()
            if path.startswith("params/")
        }

    def rows(self, name: str) -> int:
        """See `specialists.stored.Arrays`."""
        array = self._arrays[name]
        return array.chunk_layout.read_chunk.shape[0] if array.ndim else 1

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `specialists.stored.Arrays`."""
        array = self._arrays[name]
        chosen = array[start:stop] if array.ndim else array
        try:
            with remote.reached(self.where):
                return np.asarray(chosen.read().result())
        except UnavailableError:
            raise
        except ValueError as e:  # its chunks have checksums of their own, if they are compressed
            reason = " ".join(str(e).split())[:200]
            raise DamagedError(
                f"{self.where} is damaged: {name} cannot be read: {reason}. "
                "Restore it, or take another step"
            ) from e


def _url(folder: epath.Path) -> str:
    return str(folder) if remote.is_object(folder) else f"file://{folder}"


def open_params(
    checkpointer: Checkpointer,
    abstract: Any,
    *,
    step: int | None = None,
    before: int | None = None,
) -> tuple[CheckpointArrays, int]:
    """(arrays, step) as of `Checkpointer.restore_params`, opened and not yet read.

    Args:
      before: take a step below this one.

    Raises:
      UserError: as there.
    """
    steps = [s for s in checkpointer.steps() if before is None or s < before]
    if not steps or (step is not None and step not in steps):
        raise checkpointer.none(step)
    failures = []
    for candidate in [step] if step is not None else steps[::-1]:
        folder = checkpointer.directory / str(candidate)
        try:
            data = checkpointer.data(candidate)
            check_data(data, candidate, f"checkpoint {folder}")
            arrays = CheckpointArrays(folder, data, abstract)
        except UserError:
            raise
        except Exception as e:
            failures.append(f"step {candidate}: {' '.join(str(e).split())[:200]}")
            _log.warning(TRYING, failures[-1])
            continue
        if problems := tree.differences(arrays.shapes, tree.flatten(abstract)):
            raise checkpointer.misfit(candidate, [f"params/{line}" for line in problems])
        return arrays, candidate
    raise checkpointer.unreadable(failures)
