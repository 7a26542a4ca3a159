"""The console command: `soup-jax SUBCOMMAND ...`, also `python -m soup_jax.cli SUBCOMMAND ...`.

    soup-jax prepare     --config=FILE.py                       raw text -> prepared corpus
    soup-jax domains     --corpus=DIR                           what a corpus is made of
    soup-jax histogram   --documents=F --corpus=DIR             which domains documents lie in
    soup-jax plan        --config=FILE.py --topology=v5e:4x4    memory, traffic and time of a run
    soup-jax train       --config=FILE.py --workdir=RUN         corpus -> trained soup
    soup-jax sweep       --config=FILE.py --sweep.seed=0,1      many runs, and a table of them
    soup-jax evaluate    --workdir=RUN --specialists='DIR/*'    losses of specialists and baselines
    soup-jax report      RUN... --out=report.html               runs as one web page
    soup-jax instantiate --run=RUN --documents=F --out=DIR      documents -> one small model
    soup-jax mix         --run=RUN --target=F --out=h.json      documents -> a mixture to train on
    soup-jax generate    --model=DIR --prompt=TEXT              continue a prompt with it
    soup-jax score       --model=DIR --documents=F              how well it predicts documents
    soup-jax finetune    --model=DIR --documents=F --out=DIR2   train it on, on its documents
    soup-jax serve       --run=RUN                              make and ask specialists over HTTP
    soup-jax pack        --run=RUN --out=DIR                    a soup without its run and corpus
    soup-jax export      --model=DIR --format=hf --out=DIR2     for transformers, vLLM, llama.cpp
    soup-jax verify      DIR                                    is what lies there undamaged?

A config is a Python file with `get_config()`; `--config=FILE.py:ARG` passes it an argument, and
`--config.section.field=value` changes a field. `soup-jax SUBCOMMAND --help` lists the flags.
Exit status: 0 if what was asked is done; 1 if `plan` finds that the run does not fit, training
diverged, a point of `sweep` failed, a loss of `evaluate` is not finite, or the self-test of
`prepare` missed something; 2 for something you can fix, said in one line; 75 if `prepare --merge`
waits for shards; 130 if you interrupted it, 141 if nobody reads its output any more.
"""

import functools
import logging
import os
import signal
import sys
import threading
import types
from collections.abc import Sequence
from typing import Any

from absl import flags

from soup_jax import command, remote
from soup_jax.cli import (
    config_flag,
    domains,
    evaluate,
    export,
    finetune,
    generate,
    histogram,
    instantiate,
    mix,
    pack,
    plan,
    prepare,
    report,
    score,
    serve,
    sweep,
    train,
    verify,
)
from soup_jax.errors import UserError, explain

# Each defines its flags, `define(values, argv)`, and acts, `run(values)`; it imports what is slow
# to import when it acts, so that --help and mistakes are answered at once.
SUBCOMMANDS = {
    "prepare": prepare,
    "domains": domains,
    "histogram": histogram,
    "plan": plan,
    "train": train,
    "sweep": sweep,
    "evaluate": evaluate,
    "report": report,
    "pack": pack,
    "instantiate": instantiate,
    "mix": mix,
    "generate": generate,
    "score": score,
    "finetune": finetune,
    "serve": serve,
    "export": export,
    "verify": verify,
}


def _set_up_logging() -> None:
    # Our own messages only: the libraries' running commentary stays at warnings.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("soup_jax")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
    # orbax logs each thread's traceback of a full disk, through absl, before it raises the error.
    # So do gcsfs and asyncio of a server that does not answer.
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).addFilter(_is_not_told_later)


def _is_not_told_later(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not (explain(error) or remote.no_answer(error))


@functools.cache
def _heed_interrupts() -> None:
    # jax has the garbage collector call Python: an interrupt that arrives there is printed, and the
    # command goes on. It is sent again, until it arrives where it can be raised.
    hook = sys.unraisablehook

    def again() -> None:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()

    def heed(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again()
        else:
            hook(unraisable)

    def interrupt(_: int, frame: types.FrameType | None) -> None:
        while frame is not None and frame.f_code is not heed.__code__:
            frame = frame.f_back
        if frame is None:
            raise KeyboardInterrupt
        again()

    sys.unraisablehook = heed
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def run(argv: Sequence[str]) -> int:
    """Run one subcommand with its arguments; returns the exit status."""
    _set_up_logging()
    _heed_interrupts()
    try:
        with command.carried_out(argv):
            status = _run(argv)
        sys.stdout.flush()  # a closed pipe is told here, not at the end of the interpreter
        return status
    except UserError as e:
        text, status = str(e), 2
    except KeyboardInterrupt:
        text, status = "interrupted", 130
    except BrokenPipeError:
        # Whoever read the output has enough. Python would write the rest at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as e:
        text, status = explain(e), 2
        if not text:
            raise
    print(f"soup-jax: error: {text}", file=sys.stderr)
    return status


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(__doc__)
        return 0 if argv else 2
    name, *arguments = argv
    if name not in SUBCOMMANDS:
        raise UserError(f"unknown subcommand {name!r}; there are {', '.join(SUBCOMMANDS)}")
    subcommand = SUBCOMMANDS[name]
    values = flags.FlagValues()
    if "--help" in arguments or "-h" in arguments:
        subcommand.define(values, [])
        print(f"{__doc__}\nFlags of {name}:\n{_flags_help(values)}")
        return 0
    words = [f"soup-jax {name}", *config_flag.resolve(arguments)]
    try:
        subcommand.define(values, words)
        _check_once(values, words[1:])
        rest = values(words)[1:]
    except UserError:
        raise
    except Exception as e:
        where = config_flag.explain(e, words)
        if not where and not _about_flags(e):
            raise
        raise UserError((where or _plain(e)) + _hint(e)) from e
    positional = getattr(subcommand, "POSITIONAL", "")
    if positional and not values[positional].present:
        if getattr(subcommand, "SEVERAL", False):
            values[positional].value, rest = rest, []
        elif len(rest) == 1:
            values[positional].parse(rest.pop())
    if rest:
        raise UserError(f"unexpected arguments {rest}; flags are given as --name=value")
    return subcommand.run(values)


def _check_once(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    # absl takes the last of two values without a word.
    given = [a.lstrip("-").partition("=")[0] for a in arguments if a.startswith("-")]
    for name in dict.fromkeys(given):
        several = name in values and isinstance(values[name], flags.MultiFlag)
        if given.count(name) > 1 and not several:
            raise UserError(f"--{name} is given {given.count(name)} times; once is meant")


def _hint(error: BaseException) -> str:
    # A field of the config without its prefix is the likeliest unknown flag.
    if not isinstance(error, flags.UnrecognizedFlagError):
        return ""
    from soup_jax.config.schema import FIELDS

    wanted = error.flagname.replace("-", "_")
    found = [n for n in FIELDS if n == wanted or n.rpartition(".")[2] == wanted]
    return f" (a field of the config: --config.{found[0]}=...)" if len(found) == 1 else ""


def _flags_help(values: flags.FlagValues) -> str:
    # One list: absl groups flags by the module that defines them, and --config has its own.
    for flag in list(values):
        values.register_key_flag_for_module(__name__, values[flag])
    return values.module_help(__name__)


def _plain(error: BaseException) -> str:
    # The parser wraps what a config file raised in pages of tried paths, and a KeyError's text in
    # quotes; what the user needs is the innermost sentence.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [repr(error)]
    text = lines[-1] if len(lines) > 3 else " ".join(lines)
    return text.replace("\\'", "'").replace("\\n", ". ")


def _about_flags(error: BaseException) -> bool:
    # ml_collections reports a mistyped field or value with plain Python errors from inside the
    # parser; the same types from anywhere else are bugs and keep their traceback.
    if isinstance(error, flags.Error):
        return True
    trace = error.__traceback__
    while trace is not None:
        if "config_flags" in trace.tb_frame.f_code.co_filename:
            return True
        trace = trace.tb_next
    return False
