"""The soup folder: all that specialists need of a run, to be copied anywhere.

    soup.json            format, step, losses, and the checksum of every array
    config.json          of the run
    domains/             the way from documents to domain weights (data/domain_map.py)
    shared.safetensors, router.safetensors
    bank_KIND.safetensors   per kind of experts, [E, ...] per array
    README.md            what it is, in words

No window of the corpus and no optimizer state is in it, and nothing but JSON and safetensors.
Experts lie one behind the other in each array, so that a block of them is one contiguous read.
"""

import json
import math
import pathlib
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from soup_jax import inputs, places
from soup_jax import storage as files
from soup_jax.data.domain_map import DomainMap
from soup_jax.errors import UserError
from soup_jax.specialists.stored import Arrays, blocks
from soup_jax.training import integrity

FORMAT = 1
_SOUP = {
    "format": int,
    "step": int,
    "config": str,
    "files": {...: [str]},
    "checksums": {...: str},
}
_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER = 100 << 20  # as the safetensors package allows


class FolderArrays:
    """The arrays of a soup folder; each read goes to the files, none is mapped into memory."""

    def __init__(self, folder: pathlib.Path, described: Mapping[str, Any]):
        """Reads the headers.

        Raises:
          UserError: a file is missing, or is not what soup.json describes.
        """
        self.where = str(folder)
        self.checksums: Mapping[str, str] = described["checksums"]
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        self._places: dict[str, tuple[pathlib.Path, int]] = {}
        for file, names in described["files"].items():
            header, start = _read_header(folder / file)
            for name in names:
                entry = header.get(name)
                if entry is None or entry.get("dtype") not in _DTYPES:
                    raise UserError(f"{folder / file} is damaged: it has no array {name!r}")
                shape = jax.ShapeDtypeStruct(entry["shape"], _DTYPES[entry["dtype"]])
                begin, end = entry["data_offsets"]
                if end - begin != math.prod(shape.shape) * shape.dtype.itemsize:
                    raise UserError(f"{folder / file} is damaged: its header misplaces {name!r}")
                self.shapes[name], self._places[name] = shape, (folder / file, start + begin)

    def rows(self, name: str) -> int:
        """See `Arrays`."""
        del name
        return 1

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `Arrays`."""
        shape, (path, offset) = self.shapes[name], self._places[name]
        if not shape.ndim:
            return np.fromfile(path, shape.dtype, 1, offset=offset)[0]
        stop = shape.shape[0] if stop is None else min(stop, shape.shape[0])
        row = math.prod(shape.shape[1:])
        offset += start * row * shape.dtype.itemsize
        found = np.fromfile(path, shape.dtype, (stop - start) * row, offset=offset)
        return found.reshape(stop - start, *shape.shape[1:])


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    with inputs.open_file(path) as f:
        size = path.stat().st_size
        first = f.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else _MOST_HEADER + 1
        text = f.read(length) if length <= _MOST_HEADER else b""
    try:
        header = json.loads(text)
        end = max((e["data_offsets"][1] for e in header.values() if "dtype" in e), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path} is damaged: it is no safetensors file") from e
    if size != 8 + length + end:
        raise UserError(f"{path} is damaged: it has {size} bytes instead of {8 + length + end}")
    return header, 8 + length


def write_arrays(
    path: pathlib.Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], Iterator[np.ndarray]],
) -> None:
    """Write a safetensors file whose arrays come in pieces, as they lie in memory: the package
    itself wants a whole file there."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape.shape) * shape.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[np.dtype(shape.dtype)],
            "shape": list(shape.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            for piece in read(name):
                f.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


def write(
    arrays: Arrays,
    out: pathlib.Path,
    *,
    config: pathlib.Path,
    domains: DomainMap,
    described: Mapping[str, Any],
    card: str,
    dtype: str = "",
) -> None:
    """Write the folder, whole or not at all, with one block of the bank in memory.

    Args:
      config: the run's config.json.
      described: what else soup.json says.
      dtype: of the bank, "float32" or "bfloat16" (rounded to the nearest); "": as it is stored.

    Raises:
      DamagedError: an array is not what was saved.
    """
    groups: dict[str, list[str]] = {}
    for name in arrays.shapes:
        part, kind = name.split("/")[:2]
        file = f"bank_{kind.replace(':', '.')}" if part == "bank" else part
        groups.setdefault(f"{file}.safetensors", []).append(name)
    checksums: dict[str, str] = {}
    with places.written(out) as folder:
        for file, names in groups.items():
            shapes = {n: _stored_as(n, arrays.shapes[n], dtype) for n in names}

            def read(name: str, shapes: Mapping[str, Any] = shapes) -> Iterator[np.ndarray]:
                running = integrity.Running()
                for first, block in blocks(arrays, [name]):
                    rounded = block[name].astype(shapes[name].dtype)
                    running.add(rounded, first)
                    yield rounded
                checksums[name] = running.hex()

            write_arrays(folder / file, shapes, read)
        domains.copy_to(folder / "domains")
        shutil.copyfile(config, folder / "config.json")
        (folder / "README.md").write_text(card, encoding="utf-8")
        soup = {
            "format": FORMAT,
            **described,
            "config": inputs.sha256_file(folder / "config.json"),
            "files": groups,
            "checksums": checksums,
        }
        files.write_json(folder / "soup.json", files.sealed(soup))


def _stored_as(name: str, shape: jax.ShapeDtypeStruct, dtype: str) -> jax.ShapeDtypeStruct:
    bank = name.startswith("bank/")
    return jax.ShapeDtypeStruct(shape.shape, jnp.dtype(dtype) if bank and dtype else shape.dtype)


def read(folder: pathlib.Path) -> tuple[dict[str, Any], FolderArrays]:
    """(soup.json, its arrays, opened and not read).

    Raises:
      UserError: not such a folder, of a newer format, incomplete or changed.
    """
    where = folder / "soup.json"
    described = inputs.read_json(where)
    inputs.read_format(described, where, newest=FORMAT)
    inputs.check_structure(described, _SOUP, where)
    inputs.check_seal(described, where)
    config = folder / "config.json"
    if not config.is_file() or inputs.sha256_file(config) != described["config"]:
        raise UserError(f"{config} is missing or not what {where} describes: restore it")
    return described, FolderArrays(folder, described)
