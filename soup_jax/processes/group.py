"""One process's end of the line to the other processes of its run; `coordinator` is the other end.

`Solo` is the group of a single process. Code that is written for it runs with many.
"""

import os
import select
import selectors
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from soup_jax.errors import UserError
from soup_jax.processes import messages
from soup_jax.processes.join import join
from soup_jax.processes.secret import Secret
from soup_jax.processes.wire import DamagedError, Line

BEAT_SECS = 1.0
STATUS_FAILED, STATUS_USER = 1, 2
_LEAVE_SECS = 5.0
# What the coordinator may say before all are there, and after that.
_STARTING, _STARTED = ("welcome", "tick", "down"), ("tick", "met", "pause", "stop_after", "down")


class Solo:
    """The group of a single process: everything is agreed at once."""

    process_id, num_processes = 0, 1

    def __init__(self) -> None:
        self.stop_reason = ""
        self.place: dict[str, Any] = {"step": -1, "phase": "starting"}
        self.moved = time.monotonic()
        self.seconds: dict[str, float] = {}  # in each phase that has ended
        # Called before this process ends by force: the coordinator's must not be gone before the
        # others have heard why.
        self.wait_for_others: Callable[[], object] = lambda: None

    def at(self, phase: str, step: int | None = None) -> None:
        """Note where this process is; shown to the others if something goes wrong."""
        now, before = time.monotonic(), self.place["phase"]
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self.moved
        self.place = {"step": self.place["step"] if step is None else step, "phase": phase}
        self.moved = now

    def restart_clock(self) -> None:
        """Begin to count phases: a process may train one run after another."""
        self.seconds, self.moved = {}, time.monotonic()
        self.place = {"step": -1, "phase": "starting"}

    def seconds_until_now(self) -> dict[str, float]:
        """The seconds in each phase, those of the present one included."""
        phase, now = self.place["phase"], time.monotonic()
        return {**self.seconds, phase: self.seconds.get(phase, 0.0) + now - self.moved}

    def enter(self, step: int) -> bool:
        """Called before each step, on every process; False: stop instead, on all of them."""
        self.at("training", step)
        return not self.stop_reason

    def request_stop(self, reason: str) -> None:
        """Ask all processes to stop after the same step; safe inside a signal handler."""
        self.stop_reason = self.stop_reason or reason

    def meet(
        self, name: str, facts: Mapping[str, Any] | None = None, *, timeout: float = 300.0
    ) -> tuple[dict[str, Any], list[str]]:
        """Wait for all processes at `name`; returns process 0's facts and who differs in what."""
        del name, timeout
        return dict(facts or {}), []

    def require_same(self, name: str, facts: Mapping[str, Any], *, timeout: float = 300.0) -> None:
        """`meet`, refusing any difference.

        Raises:
          UserError: with the differing facts and the names of the processes.
        """
        _, differences = self.meet(name, facts, timeout=timeout)
        if differences:
            raise UserError(f"the processes do not agree ({name}):\n  " + "\n  ".join(differences))

    def fail(self, text: str, *, status: int = STATUS_FAILED, cause: str = "error") -> str:
        """Tell the others; returns what they made of it, empty if nothing beyond `text`."""
        del text, status, cause
        return ""


class Group(Solo):
    """This process's end of the line to the coordinator."""

    def __init__(
        self,
        line: Line,
        *,
        process_id: int,
        num_processes: int,
        silence_timeout: float,
        on_down: Callable[[str, int, bool], None],
        first: Sequence[dict[str, Any]] = (),
    ):
        """Starts the listening thread.

        Args:
          silence_timeout: seconds without a word from the coordinator, after which it is dead.
          on_down: gets (text, status, dump) in the listening thread, when all is lost.
          first: messages that have been received on the line already.
        """
        super().__init__()
        self.process_id, self.num_processes = process_id, num_processes
        self._line, self._silence, self._on_down = line, silence_timeout, on_down
        self._change = threading.Condition()
        self._met: dict[str, Any] = {}
        self._verdict: dict[str, Any] | None = None
        self._failing = self._closed = self._paused = False
        self._stop_after: int | None = None
        self._wake_read, self._wake_write = os.pipe()
        self.jax_port: int | None = None
        self._first = first
        self._thread = threading.Thread(target=self._listen, name="soup_jax-control", daemon=True)
        self._thread.start()

    @classmethod
    def connect(
        cls,
        address: str,
        *,
        process_id: int,
        num_processes: int,
        timeout: float,
        secret: Secret,
        **options: Any,
    ) -> "Group":
        """Connect to the coordinator and wait until everybody has.

        Raises:
          UserError: nobody who knows the secret answers at `address` in time, or this process is
            refused.
        """
        line, found = join(
            address,
            process_id=process_id,
            num_processes=num_processes,
            timeout=timeout,
            secret=secret,
        )
        options |= {"process_id": process_id, "num_processes": num_processes}
        group = cls(line, first=found, **options)
        with group._change:
            # For ever if the start fails: then `on_down` ends the process.
            group._change.wait_for(lambda: group.jax_port)
        return group

    def _listen(self) -> None:
        try:
            self._serve()
        except Exception as e:  # nobody would hear of anything again: a silent hang
            self._on_down(f"the line to the other processes broke: {e!r}", STATUS_FAILED, True)

    def _serve(self) -> None:
        last_beat, last_heard = 0.0, time.monotonic()
        self._handle_all(self._first)
        with selectors.DefaultSelector() as selector:
            selector.register(self._line.sock, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while not self._closed:
                waits = selectors.EVENT_WRITE if self._line.unsent_since else 0
                selector.modify(self._line.sock, selectors.EVENT_READ | waits)
                ready = {key.fileobj: events for key, events in selector.select(timeout=BEAT_SECS)}
                now = time.monotonic()
                if self._wake_read in ready and b"s" in os.read(self._wake_read, 64):
                    self._line.send("stop", reason=messages.printable(self._wanted, 200))
                if now - last_beat >= BEAT_SECS:
                    last_beat = now
                    # It may have moved since `now` was taken.
                    idle = max(now - self.moved, 0.0)
                    self._line.send("beat", place={**self.place, "idle": idle})
                events = ready.get(self._line.sock, 0)
                if events & selectors.EVENT_WRITE:
                    self._line.flush()
                heard = self._receive() if events & selectors.EVENT_READ else False
                if self._verdict is not None and self._line.gone:
                    return
                if heard:
                    last_heard = now
                elif now - last_heard > self._silence:
                    self._lost(f"is silent for {self._silence:g} s")
                    return

    def _receive(self) -> bool:
        """Handle what has come; True if any of it proves that the coordinator lives."""
        found = self._line.receive()
        self._handle_all(found)
        if self._line.damaged:
            self._lost(f"sent a damaged message ({self._line.damaged})")
        elif self._line.gone:
            self._lost("is gone: killed or crashed")
        return bool(found)

    def _handle_all(self, found: Sequence[dict[str, Any]]) -> None:
        for message in found:
            started = _STARTED if self.jax_port else _STARTING
            try:
                messages.check(message, messages.FROM_COORDINATOR, started)
            except DamagedError as e:
                self._line.damaged = self._line.damaged or str(e)
                return
            self._handle(message)

    def _lost(self, how: str) -> None:
        if not self._closed:
            text = f"process 0, the coordinator, {how}"
            self._handle({"op": "down", "text": text, "status": 1, "who": [0], "dump": False})

    def _handle(self, message: dict[str, Any]) -> None:
        op = message["op"]
        down = None
        with self._change:
            if op == "welcome":
                self.jax_port = message["jax_port"]
            elif op == "met":
                self._met[message["name"]] = (message["lead"], message["differences"])
            elif op == "pause":
                self._paused = True
                self._send("at", step=self.place["step"])
            elif op == "stop_after":
                self._stop_after, self.stop_reason = message["step"], message["reason"]
            elif op == "down" and self._verdict is None:
                self._verdict = message
                if not self._failing:
                    down = message
            self._change.notify_all()
        if down is not None:
            self._on_down(down["text"], down["status"], down["dump"])

    def enter(self, step: int) -> bool:
        """Called before each step, on every process; False: stop instead, on all of them."""
        with self._change:
            self._change.wait_for(lambda: not self._paused or self._stop_after is not None)
            if self._stop_after is not None and step > self._stop_after:
                return False
            self.at("training", step)
        return True

    def request_stop(self, reason: str) -> None:
        """Ask all processes to stop after the same step; safe inside a signal handler."""
        self._wanted = reason
        os.write(self._wake_write, b"s")  # no lock here: the interrupted thread may hold it

    def meet(
        self, name: str, facts: Mapping[str, Any] | None = None, *, timeout: float = 300.0
    ) -> tuple[dict[str, Any], list[str]]:
        """Wait for all processes at `name`; returns process 0's facts and who differs in what."""
        self._send("meet", name=name, facts=dict(facts or {}), timeout=timeout)
        with self._change:
            self._change.wait_for(lambda: name in self._met)
            return self._met.pop(name)

    def fail(self, text: str, *, status: int = STATUS_FAILED, cause: str = "error") -> str:
        """Tell the others; returns the coordinator's verdict if it says more than `text`."""
        with self._change:
            if self._failing or self._verdict is not None:
                # Another thread is ending this process already, for the reason of this error.
                self._change.wait_for(lambda: False, timeout=30)
                return ""
            self._failing = True
            told = messages.printable(text, messages.MOST_TEXT)
            self._send("fail", text=told, status=status, cause=cause)
            self._change.wait_for(lambda: self._verdict is not None, timeout=10)
            verdict = self._verdict
        own = verdict is not None and self.process_id in verdict["who"]
        if verdict is None or (own and cause != "hang"):  # a hang's says where everybody is
            return ""
        return verdict["text"]

    def _send(self, op: str, **values: Any) -> None:
        self._line.send(op, **values)
        if self._line.unsent_since:  # the listening thread sends the rest
            os.write(self._wake_write, b"w")

    def close(self) -> None:
        """Leave in peace."""
        self._closed = True
        self._line.send("bye")
        os.write(self._wake_write, b"q")
        self._thread.join(timeout=_LEAVE_SECS)
        deadline = time.monotonic() + _LEAVE_SECS
        while self._line.unsent_since and (left := deadline - time.monotonic()) > 0:
            select.select([], [self._line.sock], [], left)
            self._line.flush()
        self._line.close()
        for end in (self._wake_read, self._wake_write):
            os.close(end)
