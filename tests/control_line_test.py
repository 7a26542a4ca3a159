"""The line between processes among strangers: who gets in, what is dropped, and that none waits."""

import contextlib
import os
import select
import socket
import threading
import time

import pytest
from conftest import tiny_config
from group_test import SECRET, Run, coordinators_line
from processes import start, write_config
from strangers import OTHER, Strangers, answers, frame, heard, hello, open_line, process_line

from soup_jax.errors import UserError
from soup_jax.processes import lobby
from soup_jax.processes import secret as secret_lib
from soup_jax.processes.join import join
from soup_jax.processes.lobby import listen
from soup_jax.processes.secret import Secret, find_secret
from soup_jax.training import metrics

BEAT = {"step": 3, "phase": "training", "idle": 0.5}


def test_another_secret_is_refused_in_one_sentence_that_names_the_variable():
    run = Run(2, only=(0,))
    with pytest.raises(UserError) as error:
        run.connect(1, secret=Secret(OTHER))
    assert str(error.value) == (
        "its secret is not that of process 0: SOUP_JAX_SECRET must be the same on all processes"
    )
    with pytest.raises(UserError, match=r"SOUP_JAX_SECRET is not set here, and it is set at proc"):
        run.connect(1, secret=Secret(None))
    run.connect(1)
    assert run.on_all(lambda g: g.meet("x")) == [({}, [])] * 2
    run.close()
    assert run.downs.empty()


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b'{"op":"hello","protocol":"soup_jax control 1","id":1}\n', "another version of soup_jax"),
        (lambda nonce: hello(nonce, id=[1])[0], "a 'hello' with a wrong id"),
        (lambda nonce: hello(nonce, id=True)[0], "a 'hello' with a wrong id"),
        (lambda nonce: hello(nonce, id=2)[0], "process_id 2 is none of 2"),
        (lambda nonce: hello(nonce, protocol="soup_jax control 3")[0], "another version"),
        (lambda nonce: hello(nonce, OTHER)[0], "its secret is not that of process 0"),
        (lambda nonce: hello("0" * 64)[0], "its secret is not that of process 0"),
        (b"GET / HTTP/1.1\r\n\r\n", ""),
        (b"[1]\n", ""),
        (b"[" * 60_000 + b"\n", ""),
        (b"x" * 70_000, ""),
        (lambda nonce: hello(nonce)[0][:-1], ""),
        (b"", ""),
    ],
)
def test_what_does_not_fit_gets_in_no_way_and_ends_nothing(data, answer):
    run = Run(2, only=(0,))
    found = answers(run.port, data).decode()
    assert answer in found
    assert bool(answer) == bool(found)
    run.connect(1)
    assert run.on_all(lambda g: g.meet("x")) == [({}, [])] * 2
    run.close()
    assert run.downs.empty()


def test_a_recorded_hello_lets_nobody_in():
    run = Run(2, only=(0,))
    sock, nonce = open_line(run.port)
    data, _ = hello(nonce)
    sock.close()
    assert b"its secret is not" in answers(run.port, data)
    run.connect(1)
    run.close()


def test_the_coordinator_proves_itself_too():
    with listen("127.0.0.1", 0)[0] as listener:
        port = listener.getsockname()[1]

        def pretend():
            with contextlib.suppress(OSError):
                while True:
                    line = coordinators_line(listener.accept()[0], OTHER)
                    line.send("joined")
                    line.close()

        threading.Thread(target=pretend, daemon=True).start()
        with pytest.raises(UserError, match=r"no line to process 0 .* within 0\.6 s"):
            join(
                f"127.0.0.1:{port}",
                process_id=1,
                num_processes=2,
                timeout=0.6,
                secret=Secret(SECRET),
            )
        listener.shutdown(socket.SHUT_RDWR)


def test_replayed_reflected_and_forged_lines_are_dropped():
    run = Run(2, only=(0,))
    line = process_line(run.port)
    while not (own := line.lines()):  # "joined", the coordinator's message of number 0
        time.sleep(0.01)
    line.sock.send(own[0] + b"\n")
    opened = [line.open(one) for one in own]
    assert opened[0]["op"] == "joined"
    run.threads[0].join(10)
    raw = frame(line, "beat", place=BEAT)
    line.send("beat", place=BEAT)
    forged = frame(line, "bye").replace(b"bye", b"BYE")
    for data in (raw, raw, forged, b"\n", b" \n", b"1 2 3\n"):
        line.sock.send(data)
    line.send("meet", name="x", facts={"a": 1}, timeout=10)
    met = run.on_all(lambda g: g.meet("x", {"a": 1}), [run.groups[0]])
    assert met == [({"a": 1}, [])]
    peer = run.coordinator._peers[1]
    assert peer.line.num_dropped == 7
    assert peer.place["step"] == 3
    line.send("bye")
    run.groups[0].close()
    assert run.coordinator.drained.wait(10)
    assert run.downs.empty()


def trouble_from(run, *data):
    """What process 0 is told after a process has sent these bytes or frames."""
    line = process_line(run.port)
    heard(line, "welcome")
    for piece in data:
        select.select([], [line.sock], [])
        line.sock.send(piece(line) if callable(piece) else piece)
    told = heard(line, "down")  # the sender hears it too
    assert run.downs.get(timeout=20)[1] == told["text"]
    return told["text"]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        # In the wrong order: the second is not acted on.
        ([lambda line: frame(line, "bye", 1)], "a message before it is missing"),
        ([lambda line: frame(line, "dance")], "an unknown message"),
        ([lambda line: frame(line, "at", step=3)], "a 'at' at the wrong time"),
        ([lambda line: frame(line, "beat", place=[])], "a 'beat' with a wrong place"),
        (
            [lambda line: frame(line, "beat", place={**BEAT, "idle": float("nan")})],
            "a 'beat' with a wrong place",
        ),
        ([lambda line: frame(line, "fail", text="x", status=1, cause="death")], "a wrong cause"),
        ([lambda line: frame(line, "bye", more=1)], "a 'bye' with other fields"),
        ([b"x" * (1 << 15)] * 132, "a line of more than 4194304 bytes"),
    ],
)
def test_a_damaged_message_of_a_process_is_its_death(data, why):
    run = Run(2, only=(0,))
    text = trouble_from(run, *data)
    assert text.startswith("process 1 (here, pid 7) sent a damaged message (")
    assert why in text


def test_a_process_that_does_not_read_delays_nobody():
    run = Run(3, only=(0, 1))
    line = process_line(run.port, id=2, count=3)
    line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    run.threads[0].join(10)
    run.threads[1].join(10)
    groups = [run.groups[0], run.groups[1]]
    facts = {"long": "x" * 200_000}
    begin = time.monotonic()
    for i in range(40):  # eight megabytes wait for the third in the end
        line.send("meet", name=f"m{i}", facts=facts, timeout=10)
        while line.unsent_since:
            line.flush()
        results = run.on_all(lambda g, i=i: g.meet(f"m{i}", facts), groups)
        assert results == [(facts, [])] * 2
    assert run.coordinator._peers[2].line.unsent_since
    assert time.monotonic() - begin < 10
    names = [heard(line, "met")["name"] for _ in range(40)]  # all is kept, in order
    assert names == [f"m{i}" for i in range(40)]
    line.send("bye")
    for group in groups:
        group.close()
    assert run.coordinator.drained.wait(10)
    assert run.downs.empty()


def test_silent_strangers_lose_their_place(monkeypatch):
    monkeypatch.setattr(lobby, "ANSWER_SECS", 0.3)
    run = Run(2, only=(0,))
    strangers = [open_line(run.port)[0] for _ in range(lobby.MOST_STRANGERS + 20)]
    run.connect(1)
    closed = 0
    for sock in strangers:
        with contextlib.suppress(ConnectionError):
            assert sock.recv(10) == b""  # times out, an error, unless it was closed
        closed += 1
        sock.close()
    assert closed == len(strangers)
    run.close()


def test_ten_thousand_messages_of_strangers_change_nothing():
    run = Run(2, only=(0,))
    strangers = Strangers(run.port)
    run.connect(1)
    groups = run.complete()
    longest, meetings = 0.0, 0
    while any(t.is_alive() for t in strangers.threads) or meetings < 5:
        begin = time.monotonic()
        assert (
            run.on_all(lambda g, n=meetings: g.meet(f"m{n}", {"n": n}))
            == [({"n": meetings}, [])] * 2
        )
        longest, meetings = max(longest, time.monotonic() - begin), meetings + 1
        assert groups[0].enter(meetings)
        assert groups[1].enter(meetings)
    assert strangers.join() == 10_000
    assert longest < 5, "strangers delay the run"
    more = Strangers(run.port, num_connections=10, num_messages=10**6)
    groups[1].request_stop("SIGTERM")

    def train(group):
        return next(step for step in range(meetings + 1, 10**6) if not group.enter(step))

    stops = run.on_all(train)
    assert stops[0] == stops[1]
    run.close()
    more.stop()
    assert run.downs.empty()


def test_the_file_of_the_secret_is_private_and_removed_with_the_folders_made_for_it(tmp_path):
    first = find_secret(tmp_path / "runs" / "a", {})
    assert first.read() is None
    value = first.publish()
    path = tmp_path / "runs" / "a" / ".secret"
    assert path.stat().st_mode & 0o777 == 0o600
    assert find_secret(tmp_path / "runs" / "a", {}).read() == value
    second = Secret(None, path)
    assert second.publish() != value
    first.remove()
    assert path.exists()  # that of the second start
    second.remove()
    first.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_variable_is_taken_before_the_file(tmp_path):
    secret = find_secret(tmp_path, {"SOUP_JAX_SECRET": f" {'s' * 16}\n"})
    assert (secret.source, secret.read()) == (secret_lib.FROM_VARIABLE, b"s" * 16)
    assert secret.publish() == b"s" * 16
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="has 4 characters, at least 16 are needed"):
        find_secret(tmp_path, {"SOUP_JAX_SECRET": "abcd"})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the secret of the run to"):
        find_secret(tmp_path / "file", {}).publish()


def test_a_secret_of_an_earlier_start_is_read_again_until_it_is_that_of_this_one(tmp_path):
    path = tmp_path / ".secret"
    path.write_bytes(OTHER)  # left by a process 0 that was killed
    run = Run(2, only=(0,), source="file")
    found = []
    thread = threading.Thread(
        target=lambda: found.append(run.connect(1, secret=Secret(None, path))), daemon=True
    )
    thread.start()
    time.sleep(0.5)
    path.write_bytes(SECRET)
    thread.join(10)
    assert found
    run.close()
    path.unlink()


def test_a_secret_that_never_comes_is_told_with_its_path(tmp_path):
    run = Run(2, only=(0,), source="file")
    for content, message in ((None, "here is no such file"), (OTHER, "is not that of process 0")):
        if content:
            (tmp_path / ".secret").write_bytes(content)
        with pytest.raises(UserError, match=rf"within 0.5 s .*\.secret.* {message}"):
            run.connect(1, secret=Secret(None, tmp_path / ".secret"), timeout=0.5)
    run.connect(1)
    run.close()


def test_listens_where_it_is_told_and_elsewhere_if_the_name_is_not_of_here(monkeypatch, caplog):
    def addresses(host):
        sockets = listen(host, 0)
        names = {s.getsockname()[0] for s in sockets}
        assert len({s.getsockname()[1] for s in sockets}) == 1
        for s in sockets:
            s.close()
        return names

    assert addresses("127.0.0.1") == {"127.0.0.1"}
    assert "127.0.0.1" in addresses("localhost") <= {"127.0.0.1", "::1"}
    assert addresses("0.0.0.0") <= {"::", "0.0.0.0"}
    with caplog.at_level("INFO", logger="soup_jax"):
        assert addresses("192.0.2.1") <= {"::", "0.0.0.0"}  # of nobody: for documentation
        assert "listening on all addresses" in caplog.text
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        assert addresses("gpu007") <= {"::", "0.0.0.0"}  # its own name, to itself only
    with listen("127.0.0.1", 0)[0] as taken, pytest.raises(OSError, match="in use"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.slow
def test_strangers_do_not_change_a_run(tiny_corpus, tmp_path):
    fields = {"corpus.dir": tiny_corpus, "num_steps": 12, "log.every_steps": 1}
    fields |= {"model.num_layers": 1, "distributed.init_timeout_secs": 120}
    config = write_config(tmp_path, tiny_config(**fields))
    lines = []
    for name in ("quiet", "disturbed"):
        strangers = None
        with start(config, tmp_path / name, 2, slow=0.1) as processes:
            if name == "disturbed":
                wait_for_port(processes.port)  # from before the second process comes to the end
                endless = {"num_connections": 50, "num_messages": 10**6, "pause": 0.002}
                strangers = Strangers(processes.port, **endless)
            statuses, outputs = processes.join(280)
        num_sent = strangers.stop() if strangers else 0
        assert statuses == [0, 0], outputs
        lines.append(metrics.read_metrics(tmp_path / name / "metrics.jsonl"))
    assert num_sent > 10_000
    for field in ("step", "loss", "batch_hash"):
        assert [v[field] for v in lines[1]] == [v[field] for v in lines[0]]
    assert len(lines[0]) == 12
    # Not even the file of the secret is left.
    assert sorted(os.listdir(tmp_path / "quiet")) == sorted(os.listdir(tmp_path / "disturbed"))
    assert ".secret" not in os.listdir(tmp_path / "quiet")


def wait_for_port(port, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            open_line(port)[0].close()
            return
        time.sleep(0.05)
    raise AssertionError("process 0 does not listen")
