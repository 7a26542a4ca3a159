"""The flag --config of prepare, plan and train: a config file, and changes of its fields."""

import ast
import contextlib
import contextvars
import os
import pathlib
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from soup_jax.errors import UserError

_expected: contextvars.ContextVar[str] = contextvars.ContextVar("_expected", default="")

_HELP = "config file, FILE.py or FILE.py:ARG; names of shipped ones work anywhere"


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define --config, and --config.section.field for the fields of the file that argv names.

    Raises:
      UserError: fields are changed without a file, or one that does not exist.
    """
    # Checked before parsing: without the file, overrides would be reported as unknown flags.
    given = [a.lstrip("-") for a in argv if a.startswith(("--config", "-config"))]
    if given and not any(a.startswith("config=") and a != "config=" for a in given):
        raise UserError("--config=FILE.py is required")
    _check_fields(given)
    config_flags.DEFINE_config_file(
        "config", None, _HELP, lock_config=True, flag_values=values, sys_argv=list(argv)
    )


def _check_fields(given: Sequence[str]) -> None:
    from soup_jax.config.fields import nearest
    from soup_jax.config.schema import FIELDS

    for name in (a.removeprefix("config.").partition("=")[0] for a in given if "config." in a[:7]):
        if name not in FIELDS:
            raise UserError(f"--config.{name}: unknown field {name}{nearest(name, FIELDS)}")


def resolve(arguments: Sequence[str]) -> list[str]:
    """The arguments, where --config=experiments/NAME.py is the shipped file if none is here.

    Raises:
      UserError: there is no such file, or it is no Python file.
    """
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
                path = str(shipped)
                argument = f"{flag}={shipped}{colon}{rest}"
            _check_python(path)
        resolved.append(argument)
    return resolved


def _check_python(path: str) -> None:
    from soup_jax.inputs import read_text

    if not path.endswith(".py"):
        raise UserError(f"--config={path} is no Python file: a config is a FILE.py with get_config")
    text = read_text(path)
    try:
        compile(text, path, "exec")
    except (SyntaxError, ValueError) as e:
        line = f", line {e.lineno}" if isinstance(e, SyntaxError) else ""
        raise UserError(f"{path}{line} is not valid Python: {getattr(e, 'msg', e)}") from e
    # Looked for in the text, for a module that was loaded before would lend its own.
    if "get_config" not in text and "import *" not in text:
        raise UserError(f"{path} has no function get_config()")


def explain(error: BaseException, arguments: Sequence[str]) -> str:
    """Where in the config file an error arose, and which; "" for an error from elsewhere."""
    values = [a.partition("=")[2] for a in arguments if a.lstrip("-").startswith("config=")]
    path = values[-1].partition(":")[0] if values else ""
    if path and "get_config" in str(error) and isinstance(error, AttributeError):
        return f"{path} has no function get_config()"
    seen: set[int] = set()
    e: BaseException | None = error
    while e is not None and id(e) not in seen:
        seen.add(id(e))
        frames = traceback.extract_tb(e.__traceback__)
        inside = [f for f in frames if path and os.path.realpath(f.filename) == _real(path)]
        if inside:
            return f"{path}, line {inside[-1].lineno}: {type(e).__name__}: {e}"
        e = e.__cause__ or e.__context__
    return ""


def _real(path: str) -> str:
    return os.path.realpath(path)


@contextlib.contextmanager
def expected(text: str) -> Iterator[None]:
    """For the block, `checked` refuses any config but the one of this `to_text`; "": none."""
    token = _expected.set(text)
    try:
        yield
    finally:
        _expected.reset(token)


def _check_expected(text: str, path: str) -> None:
    if not _expected.get():
        return
    before, now = (_fields(t) for t in (_expected.get(), text))
    changes = [
        f"{name} {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise UserError(
            "its config is not what was checked when the sweep began: "
            f"{path} was edited meanwhile: {', '.join(changes)}"
        )


def _fields(text: str) -> dict[str, Any]:
    # Values, for a float may have been given as an integer.
    pairs = (line.split(" = ", 1) for line in text.splitlines())
    return {name: _value(value) for name, value in pairs}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except ValueError:  # nan, in a tuple
        return text


def checked(values: flags.FlagValues) -> ConfigDict:
    """The config that was asked for; UserError if there is none, or a value is wrong."""
    from soup_jax.config import schema as config_lib

    cfg = config_lib.check(given(values))
    _check_expected(config_lib.to_text(cfg), config_flags.get_config_filename(values["config"]))
    return cfg


def given(values: flags.FlagValues) -> ConfigDict:
    """The config as it was given, whose values nobody has checked; UserError if there is none."""
    cfg = values.config
    if cfg is None and not values["config"].present:
        raise UserError("--config=FILE.py is required")
    if not isinstance(cfg, ConfigDict):
        raise UserError(f"get_config() returned {type(cfg).__name__}, expected a ConfigDict")
    return cfg
