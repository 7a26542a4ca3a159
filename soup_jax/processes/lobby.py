"""Where connections to the coordinator wait until they have proved that they know the secret.

Nothing that a stranger sends reaches the run, and nothing it does makes the coordinator wait. Each
connection gets one challenge and may answer with one line. It is closed when it sends anything
else, more than 64 KiB, or no answer for ten seconds, and when too many others came after it. A
process that is pushed out by a crowd of strangers tries again (`join`).
"""

import contextlib
import dataclasses
import hmac
import ipaddress
import logging
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from soup_jax.processes import messages, wire
from soup_jax.processes.secret import VARIABLE, Secret
from soup_jax.processes.wire import DamagedError, Line

_log = logging.getLogger(__name__)

MOST_STRANGERS = 64  # and as many more as processes are still to come
MOST_BYTES = 64 << 10
ANSWER_SECS = 10.0
_ACCEPTS = 16  # in a row; then the processes of the run have their turn
_PAUSE_SECS = 0.5  # of accepting, when the system has no descriptors left


def listen(host: str, port: int, *, backlog: int = 1024) -> list[socket.socket]:
    """Listening sockets at those addresses of `host` that this machine has.

    All addresses of the machine, with a line in the log, if it has none of them: behind address
    translation a name may mean another machine that passes connections on. So too if the name means
    loopback here: some systems write their own name so into /etc/hosts, and others know it
    differently. A host of "0.0.0.0" or "::" asks for all addresses.

    Raises:
      OSError: the port is taken.
    """
    host = host.strip("[]")
    if host in ("", "0.0.0.0", "::"):
        return [_listen_everywhere(port, backlog)]
    found = []
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys((family, address) for family, *_, address in found))
    loopback = any(a[0] == "::1" or str(a[0]).startswith("127.") for _, a in addresses)
    sockets: list[socket.socket] = []
    if not loopback or host == "localhost" or _is_address(host):
        for family, address in addresses:
            port = sockets[0].getsockname()[1] if sockets else port
            try:
                own = (address[0], port, *address[2:])
                sockets.append(socket.create_server(own, family=family, backlog=backlog))
            except OSError:
                if _can_be_bound(family, address):
                    for listener in sockets:
                        listener.close()
                    raise
    if not sockets:
        _log.info("%s is no address of this machine alone: listening on all addresses", host)
        return [_listen_everywhere(port, backlog)]
    return sockets


def _is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host.partition("%")[0]))
    return False


def _can_be_bound(family: int, address: Any) -> bool:
    # With another port: whether it is the address that this machine lacks, or the port is taken.
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address[0], 0, *address[2:]))
    except OSError:
        return False
    return True


def _listen_everywhere(port: int, backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True
            )
    return socket.create_server(("", port), backlog=backlog)


@dataclasses.dataclass(eq=False)
class _Stranger:
    line: Line
    nonce: str
    since: float
    refused: bool = False  # has heard why, and may read it


class Lobby:
    """The listening sockets and the connections that nobody has vouched for."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listeners: list[socket.socket],
        secret: Secret,
        *,
        enter: Callable[[Line, Mapping[str, Any]], str],
        num_missing: Callable[[], int],
    ):
        """Registers callbacks of one argument, the events, as the data of the selector.

        Args:
          enter: gets the line and the hello of a connection that has proved itself, and takes the
            line over unless it returns why the process is refused.
          num_missing: processes that are still to come.
        """
        self._selector, self._listeners = selector, listeners
        self._secret, self._source = secret.publish(), secret.source
        self._enter, self._num_missing = enter, num_missing
        self._strangers: list[_Stranger] = []  # oldest first
        self._deaf_until: float | None = None
        self._seldom = wire.Seldom(_log)
        for listener in listeners:
            listener.setblocking(False)
        self._hear(True)

    def _hear(self, hear: bool) -> None:
        for listener in self._listeners:
            if hear:
                data = partial(self._accept, listener)
                self._selector.register(listener, selectors.EVENT_READ, data)
            else:
                self._selector.unregister(listener)

    def _accept(self, listener: socket.socket, events: int) -> None:
        del events
        for _ in range(_ACCEPTS):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as e:  # no descriptors left: the listener would wake us for ever
                self._seldom.warning(f"cannot accept connections: {e}")
                if self._strangers:
                    self._drop(self._strangers[0])
                elif self._deaf_until is None:
                    self._deaf_until = time.monotonic() + _PAUSE_SECS
                    self._hear(False)
                return
            self._greet(sock)

    def _greet(self, sock: socket.socket) -> None:
        line = Line(sock, most=MOST_BYTES)
        stranger = _Stranger(line, wire.nonce(), time.monotonic())
        self._strangers.append(stranger)
        self._selector.register(sock, selectors.EVENT_READ, partial(self._read, stranger))
        line.send("challenge", protocol=wire.PROTOCOL, nonce=stranger.nonce, secret=self._source)
        if len(self._strangers) > MOST_STRANGERS + self._num_missing():
            self._drop(self._strangers[0], "too many connections")

    def _drop(self, stranger: _Stranger, why: str = "") -> None:
        if why and not stranger.refused:
            self._seldom.warning(f"a connection that is not of this run was closed: {why}")
        self._strangers.remove(stranger)
        self._selector.unregister(stranger.line.sock)
        stranger.line.close()

    def _read(self, stranger: _Stranger, events: int) -> None:
        del events
        if stranger not in self._strangers:  # dropped since the selector woke up
            return
        try:
            why = self._answer(stranger)
        except Exception as e:  # a mistake of ours must not let strangers end the run
            why = f"error in reading it: {e!r}"
        if why and stranger in self._strangers:
            self._drop(stranger, why)

    def _answer(self, stranger: _Stranger) -> str:
        """Read what has come; returns why the connection shall be closed, if it shall."""
        line = stranger.line
        lines = line.lines()
        if line.gone:  # a look at the port, or a process that does not have the secret yet
            self._drop(stranger)
            return ""
        if line.damaged or line.num_bytes > MOST_BYTES:
            return "it sent too much"
        if stranger.refused or not lines:
            return ""
        if len(lines) > 1:
            return "it sent more than an answer"
        mac, _, payload = lines[0].partition(b" ")
        parts = stranger.nonce.encode(), payload
        if not hmac.compare_digest(mac, wire.proof(self._secret, wire.HELLO, *parts)):
            return self._refuse(stranger, lines[0])
        hello = wire.parse(payload)
        line.secure(
            wire.proof(self._secret, wire.KEY, *parts),
            sends=wire.FROM_COORDINATOR,
            expects=wire.FROM_PROCESS,
        )
        try:
            messages.check(hello, messages.HELLO)
        except DamagedError as e:
            refused = f"the coordinator does not understand it: {e}"
        else:
            refused = self._enter(line, hello)
        if refused:
            line.send("refused", text=refused)
            stranger.refused = True
        else:
            self._strangers.remove(stranger)
        return ""

    def _refuse(self, stranger: _Stranger, line: bytes) -> str:
        """In the clear: for a process with another secret or version, which its user must hear."""
        with contextlib.suppress(DamagedError):
            if wire.parse(line)["op"] == "hello":
                text = f"the coordinator speaks {wire.PROTOCOL!r}: another version of soup_jax"
                stranger.line.send("refused", text=text, why="version")
                stranger.refused = True
                return ""
        if line[64:66] != b" {":
            return "it does not speak the protocol"
        text = f"its secret is not that of process 0: {VARIABLE} must be the same on all processes"
        self._seldom.warning(f"a connection with another secret than {VARIABLE} was refused")
        stranger.line.send("refused", text=text, why="secret")
        stranger.refused = True
        return ""

    def tick(self, now: float) -> None:
        """Close the connections that had their time."""
        for stranger in self._strangers[:]:
            if now - stranger.since > ANSWER_SECS:
                self._drop(stranger, f"no answer for {ANSWER_SECS:g} s")
        if self._deaf_until is not None and now > self._deaf_until:
            self._deaf_until = None
            self._hear(True)

    def close(self) -> None:
        """Close the listening sockets and all connections that nobody took over."""
        for stranger in self._strangers[:]:
            self._drop(stranger)
        for listener in self._listeners:
            listener.close()
