"""Lines of text between two processes of a run, each with a proof of who sent it.

A connection begins in the clear. The coordinator sends a challenge: a nonce, used once. The process
answers with a hello, which has a nonce of its own, and an HMAC-SHA256 over both, keyed by the
secret of the run. Both then derive a key for this connection, and a message is the line

    SEQUENCE MAC PAYLOAD

where MAC is taken over direction, SEQUENCE and PAYLOAD, a JSON object. Whoever does not know the
secret can make no such line. A line from another connection or the other direction does not verify,
and one that came before has an old number: they are dropped as if they had never come. A line that
verifies and comes too early is not acted on; it proves that one before it was lost. A line that
verifies and is no message proves that its sender is broken. These two damage the line for good.

Nothing is encrypted: the messages hold names of hosts and fields of the config, no data.
"""

import contextlib
import hmac
import json
import logging
import secrets
import socket
import threading
import time
from typing import Any

PROTOCOL = "soup_jax control 2"
NONCE_DIGITS = 64  # of 32 bytes, in hex
# What a proof is for, as part of it: no line can be sent back to where it came from.
HELLO, KEY, FROM_PROCESS, FROM_COORDINATOR = b"hello", b"key", b"process", b"coordinator"
_MOST_BYTES = 4 << 20  # of one line; facts that processes compare are the longest
_MOST_UNSENT = 16 << 20
_CHUNK = 1 << 16


class DamagedError(Exception):
    """A message that its sender, who knows the secret, should not have sent; the text says why."""


class Seldom:
    """A logger of warnings that strangers can cause: one a minute at most."""

    def __init__(self, logger: logging.Logger, *, pause: float = 60.0):
        """`pause`: seconds between two warnings."""
        self._logger, self._pause, self._unsaid = logger, pause, 0
        self._last = -float("inf")

    def warning(self, text: str) -> None:
        """Log the text, or count it for the next one."""
        now = time.monotonic()
        if now - self._last < self._pause:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} such events before)" if self._unsaid else ""
        self._logger.warning("%s%s", text, more)
        self._last, self._unsaid = now, 0


def nonce() -> str:
    """A fresh nonce in hex."""
    return secrets.token_hex(NONCE_DIGITS // 2)


def proof(key: bytes, *parts: bytes) -> bytes:
    """The HMAC-SHA256 of the parts in hex; no two lists of parts have the same one."""
    mac = hmac.new(key, digestmod="sha256")
    for part in parts:
        mac.update(len(part).to_bytes(8, "big") + part)
    return mac.hexdigest().encode()


def parse(payload: bytes) -> dict[str, Any]:
    """The message in `payload`.

    Raises:
      DamagedError: it is not a JSON object with a text `op`.
    """
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError) as e:  # a thousand brackets are a RecursionError
        raise DamagedError(f"not JSON ({type(e).__name__})") from None
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise DamagedError("not a message")
    return message


class Line:
    """One end of a connection; it never waits. Sending is safe from several threads.

    Attributes:
      gone: the other side has closed the connection.
      damaged: why nothing more can be taken from this line; empty while all is well.
      num_bytes: received so far.
      num_dropped: lines that were dropped because they prove nothing.
      unsent_since: since when the other side takes nothing of what waits for it, on the monotonic
        clock; None if nothing waits.
    """

    def __init__(self, sock: socket.socket, *, most: int = _MOST_BYTES):
        """`most`: bytes that a line may have."""
        self.sock, self._most = sock, most
        self.gone, self.damaged = False, ""
        self.num_bytes = self.num_dropped = 0
        self.unsent_since: float | None = None
        self._key = self._sends = self._expects = b""
        self._in, self._out, self._lock = bytearray(), bytearray(), threading.Lock()
        self._num_sent = self._num_received = 0
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # the other side may be gone already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def secure(self, key: bytes, *, sends: bytes, expects: bytes) -> None:
        """From here on each line is proved with the key; `sends` and `expects` are directions."""
        self._key, self._sends, self._expects = key, sends, expects

    def accept_longer(self) -> None:
        """Take lines of messages from here on, from a side that was held to short ones before."""
        self._most = _MOST_BYTES

    def send(self, op: str, **values: Any) -> bool:
        """Send one message, or keep it until the other side takes more; False if that is gone."""
        payload = json.dumps({"op": op, **values}).encode()
        with self._lock:
            if self._key:
                sequence = b"%d" % self._num_sent
                self._num_sent += 1
                mac = proof(self._key, self._sends, sequence, payload)
                payload = b"%s %s %s" % (sequence, mac, payload)
            return self._put(payload)

    def send_raw(self, line: bytes) -> bool:
        """`send` of a line as it is: the hello, whose proof is one of its own."""
        with self._lock:
            return self._put(line)

    def flush(self) -> bool:
        """Send what waits, as far as the other side takes it; False if that is gone."""
        with self._lock:
            return self._flush()

    def _put(self, line: bytes) -> bool:
        self._out += line + b"\n"
        sent = self._flush()
        if len(self._out) > _MOST_UNSENT:
            self.damaged = self.damaged or "it does not read what it is sent"
        return sent

    def _flush(self) -> bool:
        while self._out:
            try:
                count = self.sock.send(self._out)
            except (BlockingIOError, InterruptedError):
                self.unsent_since = self.unsent_since or time.monotonic()
                return True
            except OSError:
                self._out.clear()
                self.unsent_since = None
                return False
            del self._out[:count]
            self.unsent_since = None
        return True

    def lines(self) -> list[bytes]:
        """Whole lines that have arrived, perhaps none, without a look at what they prove."""
        try:
            data = self.sock.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            data = b""
        self.gone = not data
        self.num_bytes += len(data)
        if self.damaged:  # read on all the same, to see when the other side is gone
            self._in.clear()
            return []
        first, *others = data.split(b"\n")
        self._in += first
        found = []
        for other in others:
            found.append(bytes(self._in))
            self._in = bytearray(other)
        if len(self._in) > self._most:
            self.damaged = f"a line of more than {self._most} bytes"
        return found

    def receive(self) -> list[dict[str, Any]]:
        """Messages that have arrived and are proved, perhaps none; see `gone` and `damaged`."""
        found = []
        for line in self.lines():
            message = self.open(line)
            if message is not None:
                found.append(message)
        return found

    def open(self, line: bytes) -> dict[str, Any] | None:
        """The message of a line; None if it proves nothing or the connection is damaged."""
        sequence, _, rest = line.partition(b" ")
        mac, _, payload = rest.partition(b" ")
        if self.damaged:
            return None
        expected = proof(self._key, self._expects, sequence, payload)
        # The key is empty until both sides have one: nothing can be proved by then.
        known = self._key and hmac.compare_digest(mac, expected)
        if not known or int(sequence) < self._num_received:  # a stranger's, or a second time
            self.num_dropped += 1
            return None
        if int(sequence) > self._num_received:
            self.damaged = "a message before it is missing"
            return None
        self._num_received += 1
        try:
            return parse(payload)
        except DamagedError as e:
            self.damaged = str(e)
            return None

    def close(self) -> None:
        """Close the socket."""
        with contextlib.suppress(OSError):
            self.sock.close()
