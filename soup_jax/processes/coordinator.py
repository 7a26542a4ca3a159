"""The line between the processes of a run: who is there, who is late, who died, when to stop.

Process 0 runs a `Coordinator`, a thread behind one TCP port; every process, 0 too, keeps one
connection to it, a `group.Group`. Messages are JSON lines of at most a few kilobytes, none of them
on the path of a step. jax has a service of its own for its own needs; this one adds what it lacks:

* A start that is not complete in time names the missing processes.
* A process that dies closes its connection; one whose machine is gone falls silent. The coordinator
  tells the others its name and where it was last seen, and they leave with a non-zero status
  although their main thread hangs in a collective. An error in one process reaches them likewise.
* `meet` is a barrier with a time-out that names who is missing; it compares facts on the way.
* A signal at one process stops all of them after the same step: all say which step they are in and
  wait, and the coordinator answers with the largest. The devices take no part in it.

Only who knows the secret of the run takes part (`wire`); all others wait in the `lobby`, and what
they send neither ends nor delays anything. This thread never waits for any of its connections: what
one does not take is kept for it. Each message is checked (`messages`), and a process that sends one
that it should not have sent counts as dead.
"""

import logging
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from soup_jax.processes import messages, wire
from soup_jax.processes.group import BEAT_SECS, STATUS_FAILED, STATUS_USER
from soup_jax.processes.lobby import Lobby
from soup_jax.processes.secret import Secret
from soup_jax.processes.wire import DamagedError, Line

_log = logging.getLogger(__name__)

# A death makes collectives fail elsewhere: what comes first over the line need not be the cause.
_GRACE_SECS = {"death": 0.5, "error": 0.5, "hang": 2.0, "collective": 5.0}
_CAUSES = ("death", *messages.CAUSES)  # the first of these that occurred is told
_MOST_MEETINGS = 100  # under way at once


class _Peer:
    """What the coordinator knows of one process."""

    def __init__(self, line: Line, hello: Mapping[str, Any]):
        self.line, self.id, self.num_dropped = line, hello["id"], 0
        self.name = f"process {self.id} ({hello['host']}, pid {hello['pid']})"
        self.place: dict[str, Any] = {"step": -1, "phase": "starting", "idle": 0.0}
        self.beat = time.monotonic()
        self.left = False  # in peace, or its connection has ended
        self.damaged = False  # it hears of the end, but is heard no more

    def seen(self) -> str:
        """Where it was when it last reported."""
        idle = self.place["idle"] + time.monotonic() - self.beat
        step = f"step {self.place['step']}, " if self.place["step"] >= 0 else ""
        return f"{self.name}: {step}{self.place['phase']}, for {idle:.1f} s"


class Coordinator(threading.Thread):
    """The server in process 0; runs until all processes have left or one has failed."""

    def __init__(
        self,
        listeners: list[socket.socket],
        *,
        secret: Secret,
        num_processes: int,
        jax_port: int,
        init_timeout: float,
        silence_timeout: float,
    ):
        """Takes the listening sockets over; `start` begins.

        Args:
          jax_port: where process 0 starts jax's own service, told to all.
          init_timeout, silence_timeout: seconds for all to come, and without a word of one.
        """
        super().__init__(name="soup_jax-coordinator", daemon=True)
        self._count, self._jax_port, self._welcomed = num_processes, jax_port, False
        self._selector = selectors.DefaultSelector()
        self._lobby = Lobby(
            self._selector,
            listeners,
            secret,
            enter=self._enter,
            num_missing=lambda: num_processes - len(self._peers),
        )
        self._seldom = wire.Seldom(_log)
        self._init_timeout, self._silence = init_timeout, silence_timeout
        self._peers: dict[int, _Peer] = {}
        self._meetings: dict[str, dict[str, Any]] = {}
        self._troubles: dict[str, dict[int, dict[str, Any]]] = {cause: {} for cause in _CAUSES}
        self._first_trouble = 0.0
        self._stopping: dict[str, Any] | None = None
        self._over = False
        self.drained = threading.Event()  # everybody has left

    def run(self) -> None:
        """Serve until the end."""
        try:
            self._serve()
        except Exception as e:
            self._end(f"the coordinator broke: {e!r}")
            raise
        finally:
            self._lobby.close()
            self._selector.close()
            self.drained.set()

    def _serve(self) -> None:
        start = told = next_tick = time.monotonic()
        while not self._over or any(p.id for p in self._present()):
            for key, events in self._selector.select(timeout=0.1):
                key.data(events)
            now = time.monotonic()
            self._lobby.tick(now)
            if not self._welcomed and len(self._peers) == self._count:
                self._welcomed = True
                self._broadcast("welcome", jax_port=self._jax_port)
            if not self._welcomed and not self._over:
                told = self._wait_for_all(now, start, told)
            if now >= next_tick:
                next_tick = now + BEAT_SECS
                self._broadcast("tick")
            if self._over:
                if now > self._over_since + 3.0:
                    break
                continue
            self._check(now)
            if self._welcomed and all(p.left for p in self._peers.values()):
                break

    def _present(self) -> list[_Peer]:
        return [p for p in self._peers.values() if not p.left]

    def _broadcast(self, op: str, **values: Any) -> None:
        # Process 0 last: what it hears may be the end of this thread.
        for peer in sorted(self._present(), key=lambda p: -p.id):
            peer.line.send(op, **values)
            self._watch(peer)

    def _watch(self, peer: _Peer) -> None:
        waits = selectors.EVENT_WRITE if peer.line.unsent_since else 0
        key = self._selector.get_key(peer.line.sock)
        if key.events != selectors.EVENT_READ | waits:
            self._selector.modify(peer.line.sock, selectors.EVENT_READ | waits, key.data)

    def _wait_for_all(self, now: float, start: float, told: float) -> float:
        missing = [i for i in range(self._count) if i not in self._peers]
        if now - start > self._init_timeout:
            here = ", ".join(p.name for _, p in sorted(self._peers.items()))
            self._end(
                f"{_ids(missing)} of {self._count} did not connect within {self._init_timeout:g} s "
                f"(distributed.init_timeout_secs); connected: {here}",
                status=STATUS_USER,
            )
        elif now - told > 10:
            _log.info("waiting for %s of %d", _ids(missing), self._count)
            return now
        return told

    def _enter(self, line: Line, hello: Mapping[str, Any]) -> str:
        """Take over the line of a process that knows the secret; returns why not, if so."""
        if hello["protocol"] != wire.PROTOCOL:
            return f"the coordinator speaks {wire.PROTOCOL!r}: another version of soup_jax"
        if hello["count"] != self._count:
            return f"num_processes is {hello['count']} here and {self._count} at process 0"
        if hello["id"] >= self._count:
            return f"process_id {hello['id']} is none of {self._count}"
        if hello["id"] in self._peers:
            return f"process_id {hello['id']} is taken by {self._peers[hello['id']].name}"
        if self._over:
            return "the run is at its end"
        peer = self._peers[hello["id"]] = _Peer(line, hello)
        line.accept_longer()
        self._selector.modify(line.sock, selectors.EVENT_READ, partial(self._turn, peer))
        line.send("joined")
        self._watch(peer)
        return ""

    def _turn(self, peer: _Peer, events: int) -> None:
        line = peer.line
        if events & selectors.EVENT_WRITE:
            line.flush()
        for message in line.receive() if events & selectors.EVENT_READ else ():
            if peer.left or peer.damaged:
                break
            try:
                messages.check(message, messages.FROM_PROCESS, self._allowed(peer))
                self._handle(peer, message)
            except DamagedError as e:
                self._damage(peer, str(e))
        if line.damaged and not peer.left:
            self._damage(peer, line.damaged)
        if line.num_dropped > peer.num_dropped:
            peer.num_dropped = line.num_dropped
            self._seldom.warning(f"dropped what came as {peer.name}'s and proves nothing")
        if line.gone:
            self._selector.unregister(line.sock)
            line.close()
            if not peer.left:
                peer.left = True
                self._trouble(
                    "death",
                    peer,
                    f"{peer.name} is gone: killed or crashed (last seen at {_place(peer)})",
                )
            return
        self._watch(peer)

    def _allowed(self, peer: _Peer) -> tuple[str, ...]:
        if not self._welcomed:
            return ("beat", "fail", "bye")
        paused = self._stopping is not None and peer.id not in self._stopping["at"]
        return ("beat", "meet", "stop", "fail", "bye", *(["at"] if paused else []))

    def _damage(self, peer: _Peer, why: str) -> None:
        if not peer.damaged:
            peer.damaged = True
            text = f"{peer.name} sent a damaged message ({why}; last seen at {_place(peer)})"
            self._trouble("death", peer, text)

    def _handle(self, peer: _Peer, message: Mapping[str, Any]) -> None:
        peer.beat = time.monotonic()
        op = message["op"]
        if op == "beat":
            peer.place = dict(message["place"])
        elif op == "meet":
            self._meet(peer, message)
        elif op == "stop" and self._stopping is None:
            self._stopping = {"who": peer.id, "reason": message["reason"], "at": {}}
            self._broadcast("pause")
        elif op == "at":
            assert self._stopping is not None  # `_allowed`
            self._stopping["at"][peer.id] = message["step"]
            self._settle_stop()
        elif op == "fail":
            self._trouble(
                message["cause"],
                peer,
                f"{peer.name} failed: {message['text']}",
                status=message["status"],
            )
        elif op == "bye":
            peer.left = True
            self._settle_stop()

    def _settle_stop(self) -> None:
        if self._stopping and {p.id for p in self._present()} <= set(self._stopping["at"]):
            last = max(self._stopping["at"].values(), default=-1)
            reason = f"{self._stopping['reason']} at process {self._stopping['who']}"
            self._broadcast("stop_after", step=last, reason=reason)

    def _meet(self, peer: _Peer, message: Mapping[str, Any]) -> None:
        timeout = message["timeout"]
        if len(self._meetings) >= _MOST_MEETINGS and message["name"] not in self._meetings:
            raise DamagedError("too many meetings")
        meeting = self._meetings.setdefault(
            message["name"],
            {"facts": {}, "timeout": timeout, "deadline": time.monotonic() + timeout},
        )
        facts = meeting["facts"]
        if peer.id in facts:
            raise DamagedError("the same meeting twice")
        facts[peer.id] = message["facts"]
        if len(facts) < self._count:
            return
        del self._meetings[message["name"]]
        lead, lines = facts[0], []
        for index in sorted(facts):
            lines += [
                f"{self._peers[index].name}: {name} = {facts[index].get(name)!r}, "
                f"process 0: {lead.get(name)!r}"
                for name in sorted(lead | facts[index])
                if facts[index].get(name) != lead.get(name)
            ]
        self._broadcast("met", name=message["name"], lead=lead, differences=lines[:50])

    def _trouble(self, cause: str, peer: _Peer, text: str, status: int = STATUS_FAILED) -> None:
        if not any(self._troubles.values()):
            self._first_trouble = time.monotonic()
        self._troubles[cause].setdefault(peer.id, {"text": text, "status": status})

    def _check(self, now: float) -> None:
        for peer in self._present():
            unsent = peer.line.unsent_since
            if unsent is not None and now - unsent > self._silence:
                self._trouble(
                    "death",
                    peer,
                    f"{peer.name} reads nothing for {now - unsent:.0f} s "
                    f"(distributed.heartbeat_timeout_secs; last seen at {_place(peer)})",
                )
            if now - peer.beat > self._silence:
                self._trouble(
                    "death",
                    peer,
                    f"{peer.name} is silent for {now - peer.beat:.0f} s "
                    f"(distributed.heartbeat_timeout_secs; last seen at {_place(peer)})",
                )
        for name, meeting in self._meetings.items():
            if now > meeting["deadline"]:
                missing = [p for p in self._present() if p.id not in meeting["facts"]]
                self._end(
                    f"{_ids([p.id for p in missing])} did not come to the meeting {name!r} within "
                    f"{meeting['timeout']:g} s. Where they were last seen:\n  "
                    + "\n  ".join(p.seen() for p in missing),
                    dump=True,
                )
                return
        for cause in _CAUSES:
            if self._troubles[cause] and now - self._first_trouble > _GRACE_SECS[cause]:
                self._tell(cause)
                return

    def _tell(self, cause: str) -> None:
        troubles = self._troubles[cause]
        text = "; ".join(dict.fromkeys(t["text"] for _, t in sorted(troubles.items())))
        if cause != "error":
            text += ". Where the processes were last seen:\n  "
            text += "\n  ".join(p.seen() for _, p in sorted(self._peers.items()) if not p.left)
        status = min(t["status"] for t in troubles.values())
        self._end(text, status=status, who=sorted(troubles), dump=cause == "hang")

    def _end(self, text: str, **values: Any) -> None:
        if not self._over:
            self._over, self._over_since = True, time.monotonic()
            text = text[: messages.MOST_VERDICT]  # of thousands of processes that failed alike
            self._broadcast("down", text=text, **{"status": 1, "who": [], "dump": False} | values)


def _place(peer: _Peer) -> str:
    step = f"step {peer.place['step']}, " if peer.place["step"] >= 0 else ""
    return f"{step}{peer.place['phase']}"


def _ids(ids: list[int]) -> str:
    return f"process{'es' if len(ids) > 1 else ''} {', '.join(map(str, ids)) or '(none)'}"
