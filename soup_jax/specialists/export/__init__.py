"""What a specialist can be saved as: formats by name, or a dotted path to an exporter of yours."""

import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

from soup_jax import storage as files
from soup_jax.errors import UserError
from soup_jax.models.base import BaseModel
from soup_jax.registry import Registry
from soup_jax.shapes import Params


class Exportable(Protocol):
    """What an exporter may read of a specialist (see `specialist.Specialist`)."""

    @property
    def params(self) -> Params:
        """Of the base network."""
        ...

    @property
    def model(self) -> BaseModel:
        """The base network."""
        ...

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What it is and was made from."""
        ...

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """A tokenizer.json."""
        ...


class Exporter(Protocol):
    """Writes one format.

    It gets a new, empty folder, which takes its place once all is written. Among its files must be
    a `recipe.json`: it tells that the folder is a specialist, which another may replace.
    """

    def __call__(self, specialist: Exportable, folder: pathlib.Path) -> None:
        """Write the files; UserError if this network does not fit the format."""
        ...


FORMATS: Registry[Exporter] = Registry(
    "format", {"soup_jax": "soup_jax.specialists.export.folder:write"}
)


def check_target(out: pathlib.Path) -> None:
    """Refuse a place that holds anything but a specialist; call it before work starts.

    Raises:
      UserError: it is a file, a folder with other content, or cannot be written.
    """
    files.check_folder_target(out, "--out")
    files.recover_folder(out)
    if out.exists() and any(out.iterdir()) and not (out / "recipe.json").exists():
        raise UserError(f"{out} exists and is not a specialist; choose another folder")


def export(specialist: Exportable, out: pathlib.Path, *, format: str) -> None:
    """Write a specialist's folder as a whole: it is complete, or what was there before.

    Raises:
      UserError: no such format, one that the network does not fit, or as `check_target`.
    """
    write = FORMATS.get(format)
    check_target(out)
    with files.atomic_folder(out) as folder:
        write(specialist, folder)
