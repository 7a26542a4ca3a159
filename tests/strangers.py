"""What comes to the coordinator's port from processes written by hand, and from strangers."""

import contextlib
import json
import random
import select
import socket
import threading
import time

from group_test import SECRET

from soup_jax.processes import messages, wire

OTHER = b"known to nobody in this run"


def hello(nonce, secret=SECRET, **changes):
    """(a hello as it comes over the line, the key that follows from it)."""
    fields = {"op": "hello", "protocol": wire.PROTOCOL, "nonce": wire.nonce(), "id": 1, "count": 2}
    payload = json.dumps({**fields, "host": "here", "pid": 7, **changes}).encode()
    parts = nonce.encode(), payload
    mac = wire.proof(secret, wire.HELLO, *parts)
    return mac + b" " + payload + b"\n", wire.proof(secret, wire.KEY, *parts)


def open_line(port):
    """(socket, the coordinator's nonce) of a connection that has said nothing yet."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    return sock, json.loads(sock.makefile("rb").readline())["nonce"]


def process_line(port, **changes):
    """A process's line that is written by hand: the socket, and its end in `wire`."""
    sock, nonce = open_line(port)
    data, key = hello(nonce, **changes)
    sock.sendall(data)
    line = wire.Line(sock)
    line.secure(key, sends=wire.FROM_PROCESS, expects=wire.FROM_COORDINATOR)
    return line


def frame(line, op, sequence=None, **values):
    """What `line.send` would send."""
    payload = json.dumps({"op": op, **values}).encode()
    number = b"%d" % (line._num_sent if sequence is None else sequence)
    return b"%s %s %s\n" % (
        number,
        wire.proof(line._key, wire.FROM_PROCESS, number, payload),
        payload,
    )


def heard(line, op, seconds=10.0):
    """The next message `op` from the coordinator; those after it wait for the next call."""
    waiting, end = vars(line).setdefault("waiting", []), time.monotonic() + seconds
    while time.monotonic() < end and not line.gone:
        while waiting:
            if waiting[0]["op"] == op:
                return waiting.pop(0)
            waiting.pop(0)
        select.select([line.sock], [], [], 0.1)
        waiting += line.receive()
    raise AssertionError(f"no {op}")


def answers(port, data):
    """All that the coordinator answers to these bytes, challenge first, until it is silent."""
    sock, nonce = open_line(port)
    with sock:
        sock.sendall(data(nonce) if callable(data) else data)
        sock.settimeout(0.5)
        found = b""
        with contextlib.suppress(OSError):
            while piece := sock.recv(1 << 16):
                found += piece
        return found


def mutated(rng, data):
    data = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(data)


def wrong_json(rng):
    values = [
        None,
        True,
        -1,
        1e400,
        10**400,
        "\ud800",
        [],
        {},
        [[1]],
        {"a": {}},
        "x" * 300,
        "hello",
    ]
    fields = ("op", "protocol", "id", "count", "host", "pid", "nonce", "place", "text", "cause")
    names = rng.sample(fields, rng.randrange(5)) + ["op"] * rng.randrange(2)
    table = {**messages.FROM_PROCESS, **messages.FROM_COORDINATOR}
    message = {name: rng.choice(values) for name in names}
    if rng.randrange(2):
        message["op"] = rng.choice(["hello", *table])
    return json.dumps(rng.choice([message, [message], *values])).encode()


def fuzz(rng, nonce):
    """One message of a stranger; it knows the nonce, and has recorded a hello."""
    recorded = hello(nonce, OTHER)[0]
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(200)) + b"\n" * rng.randrange(2)
    if kind == 1:
        return mutated(rng, recorded)
    if kind == 2:
        return wrong_json(rng) + b"\n"
    if kind == 3:
        return recorded.partition(b" ")[0] + b" " + wrong_json(rng) + b"\n"
    if kind == 4:
        return recorded[: rng.randrange(len(recorded))]  # and no end of the line
    size = 70_000 if rng.randrange(50) == 0 else 2000
    return rng.choice([b"[", b"{", b"x", b"0"]) * size + b"\n" * rng.randrange(2)


class Strangers:
    """Threads that send fuzz to the port, on connections that are opened again when closed."""

    def __init__(self, port, *, num_connections=50, num_messages=200, pause=0.0):
        self.port, self.num_messages, self.pause = port, num_messages, pause
        self.num_sent, self._lock, self._over = 0, threading.Lock(), False
        self.threads = [
            threading.Thread(target=self._run, args=(random.Random(i),), daemon=True)
            for i in range(num_connections)
        ]
        for thread in self.threads:
            thread.start()

    def _run(self, rng):
        sock = nonce = None
        sent = 0
        while sent < self.num_messages and not self._over:
            try:
                if sock is None:
                    sock, nonce = open_line(self.port)
                sock.sendall(fuzz(rng, nonce))
            except (OSError, ValueError):  # closed: as it should be
                sock = None
                time.sleep(0.001)
                continue
            time.sleep(self.pause)
            sent += 1
            with self._lock:
                self.num_sent += 1
            if rng.randrange(20) == 0:
                sock.close()
                sock = None

    def join(self, seconds=60.0):
        end = time.monotonic() + seconds
        for thread in self.threads:
            thread.join(max(end - time.monotonic(), 0.01))
        return self.num_sent

    def stop(self):
        self._over = True
        return self.join()
