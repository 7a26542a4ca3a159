"""How a process comes to its line to the coordinator: connect, challenge, hello, joined.

Until the coordinator has proved in turn that it knows the secret, anybody may answer at its
address, or nobody. So all is tried again until the time is over.
"""

import contextlib
import json
import os
import select
import socket
import time
from typing import Any

from soup_jax.errors import UserError
from soup_jax.processes import messages, wire
from soup_jax.processes.secret import FROM_FILE, VARIABLE, Secret
from soup_jax.processes.wire import DamagedError, Line

_PAUSE_SECS = 0.2
_ANSWER_SECS = 10.0


class _AgainError(Exception):
    """It did not come about yet; the text says why."""


def join(
    address: str, *, process_id: int, num_processes: int, timeout: float, secret: Secret
) -> tuple[Line, list[dict[str, Any]]]:
    """Connect to the coordinator; returns the line, and messages that have come with the answer.

    Args:
      timeout: seconds.

    Raises:
      UserError: nobody who knows the secret answers at `address` in time, or this process is
        refused.
    """
    deadline = time.monotonic() + timeout
    host, port = address.rsplit(":", 1)
    within = f"{address} within {timeout:g} s (distributed.init_timeout_secs)"
    refused: set[bytes] = set()  # secrets of an earlier start, which its file still held
    while True:
        try:
            sock = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
            return _introduce(Line(sock), secret, refused, id=process_id, count=num_processes)
        except OSError as e:
            text = f"process 0 does not answer at the coordinator's address {within}: {e}"
        except (_AgainError, DamagedError) as e:
            text = f"no line to process 0 at the coordinator's address {within}: {e}"
        if time.monotonic() > deadline:
            raise UserError(text)
        time.sleep(_PAUSE_SECS)


def _introduce(
    line: Line, secret: Secret, refused: set[bytes], **who: int
) -> tuple[Line, list[dict[str, Any]]]:
    with contextlib.ExitStack() as stack:
        stack.callback(line.close)
        challenge = _clear(_next(line)[0])
        _raise_if_refused(challenge)
        value = _read(secret, challenge["secret"])
        if value in refused:
            raise _AgainError(f"the secret in {secret.path} is not that of process 0")
        hello = {
            "op": "hello",
            "protocol": wire.PROTOCOL,
            "nonce": wire.nonce(),
            **who,
            "host": messages.printable(socket.gethostname(), 255),
            "pid": os.getpid(),
        }
        payload = json.dumps(hello).encode()
        parts = challenge["nonce"].encode(), payload
        line.send_raw(wire.proof(value, wire.HELLO, *parts) + b" " + payload)
        line.secure(
            wire.proof(value, wire.KEY, *parts),
            sends=wire.FROM_PROCESS,
            expects=wire.FROM_COORDINATOR,
        )
        found: list[dict[str, Any]] = []
        while not found:
            for answer in _next(line):
                if answer.startswith(b"{"):
                    told = _clear(answer)
                    if told.get("why") == "secret" and secret.source == FROM_FILE:
                        refused.add(value)
                    _raise_if_refused(told, again=value in refused)
                elif (message := line.open(answer)) is not None:
                    messages.check(message, messages.FROM_COORDINATOR)
                    found.append(message)
            if line.damaged:
                raise _AgainError(f"damaged messages come from there ({line.damaged})")
        if found[0]["op"] == "refused":
            raise UserError(found[0]["text"])
        messages.check(found[0], messages.FROM_COORDINATOR, ("joined",))
        stack.pop_all()
        return line, found[1:]


def _next(line: Line) -> list[bytes]:
    """At least one line, as it came."""
    deadline = time.monotonic() + _ANSWER_SECS
    while not line.gone and not line.damaged:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([line.sock], [], [], left)[0]:
            raise _AgainError(f"no answer for {_ANSWER_SECS:g} s")
        if found := line.lines():
            return found
    raise _AgainError(line.damaged or "the connection was closed")


def _clear(line: bytes) -> dict[str, Any]:
    message = wire.parse(line)
    messages.check(message, messages.CLEAR)
    return message


def _raise_if_refused(message: dict[str, Any], *, again: bool = False) -> None:
    if message["op"] == "refused":
        raise _AgainError(message["text"]) if again else UserError(message["text"])


def _read(secret: Secret, source: str) -> bytes:
    if source != secret.source:
        here, there = ("not ", "") if secret.source == FROM_FILE else ("", "not ")
        raise UserError(f"{VARIABLE} is {here}set here, and it is {there}set at process 0")
    value = secret.read()
    if value is None:
        raise _AgainError(
            f"process 0 wrote its secret to {secret.path}, and here is no such file: let --workdir "
            f"be a folder that all processes see, or set {VARIABLE} on all of them"
        )
    return value
