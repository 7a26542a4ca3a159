"""The flag --config of prepare, plan and train: a config file, and changes of its fields."""

import os
import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from soup_jax.errors import UserError


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define --config, and --config.section.field for the fields of the file that argv names."""
    # Checked before parsing: without the file, overrides would be reported as unknown flags.
    given = [a for a in argv if a.startswith(("--config", "-config"))]
    if given and not any(a.lstrip("-").startswith("config=") for a in given):
        raise UserError("--config=FILE.py is required")
    config_flags.DEFINE_config_file(
        "config",
        None,
        "config file, FILE.py or FILE.py:ARG; names of shipped ones work anywhere",
        lock_config=True,
        flag_values=values,
        sys_argv=list(argv),
    )


def resolve(arguments: Sequence[str]) -> list[str]:
    """The arguments, where --config=experiments/NAME.py is the shipped file if none is here."""
    from soup_jax.experiments import base

    folder = pathlib.Path(base.__file__).parent
    resolved = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if argument in ("--config", "-config") and left:
            argument = f"{argument}={left.pop(0)}"
        flag, _, value = argument.partition("=")
        if flag in ("--config", "-config") and value:
            path, colon, rest = value.partition(":")
            shipped = folder / path.removeprefix("experiments/")
            if not os.path.exists(path):
                if not (path.startswith("experiments/") and shipped.exists()):
                    names = sorted(f"experiments/{p.name}" for p in folder.glob("[a-z]*.py"))
                    raise UserError(f"no config file {path!r}; shipped with soup_jax: {names}")
                argument = f"{flag}={shipped}{colon}{rest}"
        resolved.append(argument)
    return resolved


def checked(values: flags.FlagValues) -> ConfigDict:
    """The config that was asked for; UserError if there is none, or a value is wrong."""
    from soup_jax.config import schema as config_lib

    if values.config is None:
        raise UserError("--config=FILE.py is required")
    return config_lib.check(values.config)
