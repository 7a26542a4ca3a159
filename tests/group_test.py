"""The line between processes: who is missing, who differs, who died, and when all stop."""

import queue
import random
import socket
import threading
import time

import pytest

from soup_jax.errors import UserError
from soup_jax.processes import wire
from soup_jax.processes.coordinator import Coordinator
from soup_jax.processes.group import BEAT_SECS, Group, Solo
from soup_jax.processes.lobby import listen
from soup_jax.processes.secret import FROM_VARIABLE, Secret
from soup_jax.processes.wire import Line

SECRET = b"known to all processes of the run"


class Run:
    """A coordinator and groups, all in this process; what would end a process goes to `downs`."""

    def __init__(
        self,
        num_processes,
        *,
        only=None,
        init_timeout=20.0,
        silence_timeout=60.0,
        source=FROM_VARIABLE,
    ):
        self.downs: queue.Queue = queue.Queue()
        listeners = listen("127.0.0.1", 0)
        self.port = listeners[0].getsockname()[1]
        self.source = source
        self.coordinator = Coordinator(
            listeners,
            secret=self.secret(),
            num_processes=num_processes,
            jax_port=4242,
            init_timeout=init_timeout,
            silence_timeout=silence_timeout,
        )
        self.coordinator.start()
        self.num_processes, self.silence = num_processes, silence_timeout
        self.groups: dict[int, Group] = {}
        ids = range(num_processes) if only is None else only
        self.threads = [threading.Thread(target=self.connect, args=(i,), daemon=True) for i in ids]
        for thread in self.threads:
            thread.start()

    def connect(self, index, **changes):
        self.groups[index] = Group.connect(
            f"127.0.0.1:{self.port}",
            process_id=index,
            num_processes=changes.get("num_processes", self.num_processes),
            timeout=changes.get("timeout", 10),
            secret=changes.get("secret", self.secret()),
            silence_timeout=self.silence,
            on_down=lambda text, status, dump: self.downs.put((index, text, status, dump)),
        )

    def secret(self):
        secret = Secret(SECRET)
        secret.source = self.source
        return secret

    def complete(self):
        for thread in self.threads:
            thread.join(20)
        assert len(self.groups) == self.num_processes
        return [self.groups[i] for i in range(self.num_processes)]

    def on_all(self, function, groups=None):
        """[function(group) of each], called at the same time."""
        groups = self.complete() if groups is None else groups
        results = [None] * len(groups)

        def call(i):
            results[i] = function(groups[i])

        threads = [
            threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(groups))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        return results

    def close(self):
        for group in self.complete():
            group.close()
        assert self.coordinator.drained.wait(10)


def kill(group):
    """What the kernel does to the line of a killed process."""
    group._closed = True
    group._line.sock.shutdown(socket.SHUT_RDWR)


def test_all_meet_and_learn_process_0s_facts_and_who_differs():
    run = Run(3)
    assert [g.jax_port for g in run.complete()] == [4242] * 3
    facts = [{"seed": 1, "lr": 0.1}, {"seed": 1, "lr": 0.1}, {"seed": 2, "lr": 0.1, "new": 3}]
    results = run.on_all(lambda g: g.meet("config", facts[g.process_id]))
    for lead, differences in results:
        assert lead == facts[0]
        assert len(differences) == 2
        assert all(line.startswith("process 2 (") for line in differences)
        assert differences[0].endswith("new = 3, process 0: None")
        assert differences[1].endswith("seed = 2, process 0: 1")
    for name in ("once", "once", "again"):  # names may come back
        assert run.on_all(lambda g, n=name: g.meet(n)) == [({}, [])] * 3
    run.close()
    assert run.downs.empty()


def test_require_same_refuses_with_the_name_of_the_process():
    run = Run(2)

    def differ(group):
        with pytest.raises(UserError, match=r"do not agree \(data\)[\s\S]*process 1 .*corpus = 1"):
            group.require_same("data", {"corpus": group.process_id})
        return True

    assert run.on_all(differ) == [True, True]
    run.close()


def test_a_start_that_is_not_complete_in_time_names_who_is_missing():
    run = Run(4, only=(0, 2), init_timeout=1.0)
    told = {run.downs.get(timeout=20)[:2] for _ in range(2)}
    assert {index for index, _ in told} == {0, 2}
    for _, text in told:
        assert text.startswith("processes 1, 3 of 4 did not connect within 1 s")
        assert "connected: process 0 (" in text


def test_a_coordinator_that_is_not_there_is_named_with_its_address():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"process 0 does not answer .* {address} within 0.5 s"):
            Group.connect(
                address,
                process_id=1,
                num_processes=2,
                timeout=0.5,
                secret=Secret(SECRET),
                silence_timeout=1,
                on_down=lambda *_: None,
            )


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        (0, {}, "process_id 0 is taken by process 0"),
        (1, {"num_processes": 3}, "num_processes is 3 here and 2 at process 0"),
    ],
)
def test_a_process_that_does_not_fit_is_refused_and_the_others_go_on(index, changes, message):
    run = Run(2, only=(0,))
    while not run.coordinator._peers:
        time.sleep(0.01)  # process 0 is there first
    with pytest.raises(UserError, match=message):
        run.connect(index, **changes)
    run.connect(1)
    run.close()
    assert run.downs.empty()


def test_a_process_that_dies_is_named_to_all_others_with_its_place():
    run = Run(3)
    groups = run.complete()
    groups[1].enter(17)
    groups[1]._line.send("beat", place={**groups[1].place, "idle": 0.0})
    kill(groups[1])
    told = [run.downs.get(timeout=20) for _ in range(2)]
    assert sorted(t[0] for t in told) == [0, 2]
    for _, text, status, dump in told:
        assert text.startswith("process 1 (")
        assert "is gone: killed or crashed (last seen at step 17, training)" in text
        assert (status, dump) == (1, False)


def test_a_process_that_falls_silent_is_named(monkeypatch):
    run = Run(2, silence_timeout=3.0)
    groups = run.complete()
    # As if its machine had lost the network: the connection stays open, and nothing comes.
    monkeypatch.setattr(groups[1]._line, "send", lambda *_, **__: True)
    told = {index: rest for index, *rest in (run.downs.get(timeout=20) for _ in range(2))}
    text, status, _ = told[0]
    assert status == 1
    assert "process 1 (" in text
    assert "is silent for 3 s (distributed.heartbeat_timeout_secs" in text


def coordinators_line(sock, secret=SECRET):
    """The other end of a process's line, up to the hello."""
    line, nonce = Line(sock), wire.nonce()
    line.send("challenge", protocol=wire.PROTOCOL, nonce=nonce, secret="variable")
    while not (hello := line.lines()):
        time.sleep(0.01)
    key = wire.proof(secret, wire.KEY, nonce.encode(), hello[0].partition(b" ")[2])
    line.secure(key, sends=wire.FROM_COORDINATOR, expects=wire.FROM_PROCESS)
    return line


def test_the_death_of_the_coordinator_is_told_by_those_who_are_left():
    with listen("127.0.0.1", 0)[0] as listener:
        results: queue.Queue = queue.Queue()
        port = listener.getsockname()[1]

        def connect():
            Group.connect(
                f"127.0.0.1:{port}",
                process_id=1,
                num_processes=2,
                timeout=5,
                secret=Secret(SECRET),
                silence_timeout=60,
                on_down=lambda *told: results.put(told),
            )

        threading.Thread(target=connect, daemon=True).start()
        line = coordinators_line(listener.accept()[0])
        line.send("joined")
        line.send("welcome", jax_port=1)
        line.close()
    text, status, _ = results.get(timeout=20)
    assert text == "process 0, the coordinator, is gone: killed or crashed"
    assert status == 1


def test_an_error_reaches_the_others_and_comes_before_what_it_causes():
    run = Run(3)
    groups = run.complete()
    causes = {1: ("OSError: no space left on device", "error"), 2: ("Gloo: reset", "collective")}
    verdicts = run.on_all(
        lambda g: g.fail(causes[g.process_id][0], cause=causes[g.process_id][1]), groups[1:]
    )
    assert verdicts[0] == ""  # its own error: nothing to add
    for text in (verdicts[1], run.downs.get(timeout=20)[1]):
        assert "process 1 (" in text
        assert "failed: OSError: no space left on device" in text
        assert "Gloo" not in text


def test_a_hang_dumps_the_stacks_of_all_and_says_where_each_one_was():
    run = Run(2)
    groups = run.complete()
    groups[0].enter(8)
    groups[1].enter(7)
    groups[1].at("reading data")
    for group in groups:
        group.moved -= 30  # no step for so long
        group._line.send("beat", place={**group.place, "idle": 30.0})
    (verdict,) = run.on_all(lambda g: g.fail("no progress for 30 s", cause="hang"), groups[:1])
    index, text, status, dump = run.downs.get(timeout=20)
    assert (index, status, dump) == (1, 1, True)
    assert verdict == text
    lines = text.splitlines()
    assert "failed: no progress for 30 s" in lines[0]
    assert "): step 8, training, for 3" in lines[1]
    assert "): step 7, reading data, for 3" in lines[2]


def test_a_meeting_that_is_not_complete_in_time_names_who_is_missing():
    run = Run(3)
    groups = run.complete()
    groups[2].at("restoring")
    groups[2]._line.send("beat", place={**groups[2].place, "idle": 0.0})
    for group in groups[:2]:
        threading.Thread(
            target=group.meet, args=("read",), kwargs={"timeout": 1}, daemon=True
        ).start()
    told = [run.downs.get(timeout=20) for _ in range(3)]
    for _, text, _, dump in told:
        assert text.startswith("process 2 did not come to the meeting 'read' within 1 s")
        assert "restoring" in text
        assert dump


def test_a_process_that_moves_while_its_beat_is_made_is_no_damage():
    run = Run(2)
    groups = run.complete()
    groups[1].moved = time.monotonic() + 100  # as if long after the beat's own clock was read
    time.sleep(1.5 * BEAT_SECS)
    lead, differences = run.on_all(lambda group: group.meet("after a beat"), groups)[1]
    assert (lead, differences) == ({}, [])
    assert run.downs.empty()
    for group in groups:
        group.close()


@pytest.mark.parametrize("seed", range(5))
def test_all_stop_after_the_same_step_wherever_the_signal_comes(seed):
    run = Run(4)
    groups = run.complete()
    rng = random.Random(seed)
    pauses = {g.process_id: rng.random() * 0.003 for g in groups}
    asks = {rng.randrange(4): rng.randrange(30) for _ in range(2)}

    def train(group):
        for step in range(3, 400):
            if not group.enter(step):
                return step
            if asks.get(group.process_id) == step:
                group.request_stop("SIGTERM")
            time.sleep(pauses[group.process_id])
        return None

    stops = run.on_all(train)
    assert len(set(stops)) == 1
    assert stops[0] is not None
    assert stops[0] > min(asks.values())
    assert groups[0].stop_reason.startswith("SIGTERM at process ")
    run.close()


def test_a_signal_before_the_first_step_stops_all_before_it():
    run = Run(2)
    groups = run.complete()
    groups[1].request_stop("SIGTERM")
    while not groups[0].stop_reason:
        time.sleep(0.01)
    assert run.on_all(lambda g: g.enter(40)) == [False, False]
    run.close()


def test_a_group_of_one_agrees_with_itself():
    group = Solo()
    assert group.meet("x", {"a": 1}) == ({"a": 1}, [])
    group.require_same("x", {"a": 1})
    assert group.enter(3)
    group.request_stop("SIGTERM")
    group.request_stop("SIGINT")
    assert not group.enter(4)
    assert group.stop_reason == "SIGTERM"
    assert group.fail("error") == ""
