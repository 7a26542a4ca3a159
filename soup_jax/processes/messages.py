"""What the messages between the processes of a run may hold, in both directions.

A table gives the fields of each message and a check of each field. A message has exactly these
fields, and `check` says what is wrong otherwise. Bounds are far above what a run needs: they keep a
broken process from filling the memory or the terminal of all others.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from soup_jax.processes.wire import NONCE_DIGITS, DamagedError

# A process reports these; what else can go wrong with it, the coordinator finds out itself.
CAUSES = ("error", "hang", "collective")
MOST_TEXT, MOST_NAME, MOST_VERDICT = 10_000, 200, 1 << 19
_MOST_STEP, _MOST_SECS, _MOST_PROCESSES = 1 << 53, 1e9, 1_000_000

Check = Callable[[Any], bool]
Fields = Mapping[str, Check]


def whole(low: int, high: int) -> Check:
    """An integer, and no bool, from `low` to `high`."""
    return lambda v: type(v) is int and low <= v <= high


def text(most: int) -> Check:
    """A string of at most `most` characters that can be printed to any terminal."""
    return lambda v: isinstance(v, str) and len(v) <= most and _has_no_surrogate(v)


def printable(value: str, most: int) -> str:
    """The value as `text(most)` takes it; names of files may hold what UTF-8 cannot."""
    return value.encode("utf-8", "backslashreplace").decode()[:most]


def _has_no_surrogate(value: str) -> bool:
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


def _seconds(value: Any) -> bool:
    # json.loads makes numbers of NaN and Infinity, and integers of any length.
    return type(value) in (int, float) and 0 <= value <= _MOST_SECS and math.isfinite(value)


def _facts(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= 10_000


def _nonce(value: Any) -> bool:
    digits = "0123456789abcdef"
    return isinstance(value, str) and len(value) == NONCE_DIGITS and set(value) <= set(digits)


def _place(value: Any) -> bool:
    fields = {"step": whole(-1, _MOST_STEP), "phase": text(MOST_NAME), "idle": _seconds}
    return isinstance(value, dict) and not _wrong(value, fields)


def _list_of(item: Check, most: int) -> Check:
    return lambda v: isinstance(v, list) and len(v) <= most and all(map(item, v))


# In the clear, before both sides have proved that they know the secret.
CLEAR: Mapping[str, Fields] = {
    "challenge": {"protocol": text(MOST_NAME), "nonce": _nonce, "secret": text(MOST_NAME)},
    "refused": {"text": text(MOST_TEXT), "why": text(MOST_NAME)},
}
HELLO: Mapping[str, Fields] = {
    "hello": {
        "protocol": text(MOST_NAME),
        "nonce": _nonce,
        "id": whole(0, _MOST_PROCESSES),
        "count": whole(1, _MOST_PROCESSES),
        "host": text(255),
        "pid": whole(0, 1 << 32),
    }
}
FROM_PROCESS: Mapping[str, Fields] = {
    "beat": {"place": _place},
    "meet": {"name": text(MOST_NAME), "facts": _facts, "timeout": _seconds},
    "stop": {"reason": text(MOST_NAME)},
    "at": {"step": whole(-1, _MOST_STEP)},
    "fail": {
        "text": text(MOST_TEXT),
        "status": whole(1, 255),
        "cause": lambda v: isinstance(v, str) and v in CAUSES,
    },
    "bye": {},
}
FROM_COORDINATOR: Mapping[str, Fields] = {
    "joined": {},
    "refused": {"text": text(MOST_TEXT)},
    "welcome": {"jax_port": whole(1, 65535)},
    "tick": {},
    "met": {
        "name": text(MOST_NAME),
        "lead": _facts,
        "differences": _list_of(text(1 << 20), 1000),
    },
    "pause": {},
    "stop_after": {"step": whole(-1, _MOST_STEP), "reason": text(1000)},
    "down": {
        "text": text(MOST_VERDICT),
        "status": whole(1, 255),
        "who": _list_of(whole(0, _MOST_PROCESSES), _MOST_PROCESSES),
        "dump": lambda v: isinstance(v, bool),
    },
}


def check(
    message: Mapping[str, Any], table: Mapping[str, Fields], allowed: Iterable[str] = ()
) -> None:
    """Check a message against its table.

    Args:
      allowed: the operations that may come now; default all of the table.

    Raises:
      DamagedError: what is wrong; nothing of the message's values is in the text.
    """
    op = message["op"]
    if op not in table:
        raise DamagedError("an unknown message")
    if op not in (tuple(allowed) or table):
        raise DamagedError(f"a {op!r} at the wrong time")
    if wrong := _wrong({k: v for k, v in message.items() if k != "op"}, table[op]):
        raise DamagedError(f"a {op!r} {wrong}")


def _wrong(values: Mapping[str, Any], fields: Fields) -> str:
    if values.keys() != fields.keys():
        return "with other fields"
    bad = [name for name, check in fields.items() if not check(values[name])]
    return f"with a wrong {bad[0]}" if bad else ""
