"""What a specialist can be saved as: formats by name, or a dotted path to an exporter of yours."""

import inspect
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

from soup_jax import places
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

    def __call__(self, specialist: Exportable, folder: pathlib.Path, **options: Any) -> None:
        """Write the files; UserError if this network does not fit the format.

        An exporter names the options that it takes, such as `dtype`; most take none.
        """
        ...


FORMATS: Registry[Exporter] = Registry(
    "format",
    {
        "gguf": "soup_jax.specialists.export.gguf:write",
        "hf": "soup_jax.specialists.export.hf:write",
        "lora": "soup_jax.specialists.lora:write",
        "soup_jax": "soup_jax.specialists.export.folder:write",
    },
)


def check_target(out: pathlib.Path) -> None:
    """Refuse a place that holds anything but a specialist; call it before work starts.

    Raises:
      UserError: it is a file, a folder with other content, or cannot be written.
    """
    places.check_replaceable(out, "recipe.json", "is not a specialist")


def export(specialist: Exportable, out: pathlib.Path, *, format: str, **options: Any) -> None:
    """Write a specialist's folder as a whole: it is complete, or what was there before.

    Args:
      options: what the format takes, such as dtype="bfloat16" of "hf".

    Raises:
      UserError: no such format or option, one that the network does not fit, or as `check_target`.
    """
    write = FORMATS.get(format)
    try:
        inspect.signature(write).bind(specialist, out, **options)
    except TypeError as e:
        raise UserError(f"the format {format!r} does not take {', '.join(options)}: {e}") from e
    check_target(out)
    if format != "soup_jax" and out.resolve() == specialist.tokenizer_path.resolve().parent:
        raise UserError(f"{out} holds the specialist itself; choose another folder for the export")
    with places.written(out) as folder:
        write(specialist, folder, **options)
