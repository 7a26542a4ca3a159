"""The served soup: the OpenAI protocol, what is refused with which status, limits, the page."""

import concurrent.futures
import functools
import io
import json
import pathlib
import re
import socket
import subprocess
import sys
import threading
import zipfile

import jax
import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

import uvicorn
from conftest import tiny_config
from starlette.testclient import TestClient

from soup_jax.cli import main
from soup_jax.specialists.decoding import Sampling
from soup_jax.specialists.generate import Request
from soup_jax.specialists.open import load
from soup_jax.specialists.serve import protocol
from soup_jax.specialists.serve.app import make_app
from soup_jax.specialists.serve.engine import Engine, Limits
from soup_jax.specialists.serve.networks import Networks
from soup_jax.training.loop import train

PAGE = pathlib.Path(protocol.__file__).parent / "page"


@pytest.fixture(scope="module")
def soup(tiny_run):
    return load(tiny_run)


@pytest.fixture(scope="module")
def client(soup):
    with TestClient(make_app(Engine(soup)), base_url="http://localhost") as client:
        yield client


def _made(client, **body):
    answer = client.post("/v1/specialists", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def _completed(client, **body):
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_specialist_of_documents_is_that_of_instantiate(client, soup, texts):
    made = _made(client, name="cooking", documents=texts)
    expected = soup.instantiate(texts)
    np.testing.assert_allclose(made["h"], expected.h_K, rtol=1e-6)
    np.testing.assert_allclose(made["alpha"], expected.alpha_E, rtol=1e-5, atol=1e-7)
    assert made["documents"] == 30
    assert client.get("/v1/specialists/cooking").json()["alpha"] == made["alpha"]
    names = [m["id"] for m in client.get("/v1/models").json()["data"]]
    assert {"generic", "shared", "cooking"} <= set(names)
    body = {"model": "cooking", "prompt": "butter", "max_tokens": 12, "temperature": 0}
    answer = _completed(client, **body)
    (choice,) = answer["choices"]
    assert choice["text"] == expected.generate("butter", max_tokens=12, temperature=0)
    assert choice["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"] <= 12
    assert answer["usage"]["prompt_tokens"] == len(expected.tokenizer.encode("butter"))
    scores = client.post("/v1/score", json={"model": "cooking", "documents": texts[:3]}).json()
    for found, score in zip(scores["documents"], expected.score(texts[:3])):
        assert found["loss"] == pytest.approx(score.loss, rel=1e-5)
        assert found["bytes"] == score.num_bytes


def test_weights_and_coefficients(client, soup):
    made = _made(client, name="weights", h=[0, 0, 3, 0, 1, 0])
    np.testing.assert_allclose(made["h"], [0, 0, 0.75, 0, 0.25, 0])
    np.testing.assert_allclose(made["alpha"], soup.at(made["h"]).alpha_E, rtol=1e-5)
    same = _made(client, alpha=[0.5, -0.5, 0, 1])
    assert same["alpha"] == [0.5, -0.5, 0, 1]
    assert same["id"] == _made(client, alpha=[0.5, -0.5, 0, 1])["id"]
    assert client.delete(f"/v1/specialists/{same['id']}").status_code == 200
    assert client.get(f"/v1/specialists/{same['id']}").status_code == 404
    assert client.delete("/v1/specialists/generic").status_code == 400


def test_many_prompts_and_choices(client):
    body = {"model": "generic", "prompt": ["butter", "wind"], "n": 2, "max_tokens": 8}
    choices = _completed(client, **body)["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    again = _completed(client, **body)["choices"]
    assert [c["text"] for c in choices] == [c["text"] for c in again]
    assert len({c["text"] for c in choices}) > 1


def _events(text: str):
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_stream_adds_up_to_the_whole(client):
    body = {"model": "generic", "prompt": "butter", "max_tokens": 30, "seed": 3}
    whole = _completed(client, **body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = client.post("/v1/completions", json=body | options)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = _events(answer.text)
    pieces = [e["choices"][0]["text"] for e in events if e["choices"]]
    assert len(pieces) > 1
    assert "".join(pieces) == whole["choices"][0]["text"]
    assert events[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert events[-1]["usage"] == whole["usage"]
    stop = whole["choices"][0]["text"][3:6]
    cut = _completed(client, **body, stop=stop)["choices"][0]
    assert cut["text"] == whole["choices"][0]["text"].partition(stop)[0]
    assert cut["finish_reason"] == "stop"


def test_a_folder_for_transformers(client, texts):
    _made(client, name="zipped", documents=texts[:12])
    answer = client.get("/v1/specialists/zipped/download")
    assert answer.status_code == 200
    with zipfile.ZipFile(io.BytesIO(answer.content)) as folder:
        assert {"zipped/config.json", "zipped/tokenizer.json"} <= set(folder.namelist())
    assert client.get("/v1/specialists/none/download").status_code == 404


KILLED = """
import os, signal
from soup_jax.specialists.serve import app
with app.temporary_folder(app._DOWNLOADS):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_downloads_leave_nothing_and_a_start_removes_those_of_the_killed(
    soup, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    subprocess.run([sys.executable, "-c", KILLED], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with TestClient(make_app(Engine(soup)), base_url="http://localhost") as client:
        assert not list(tmp_path.iterdir())
        assert client.get("/v1/specialists/generic/download").status_code == 200
    assert not list(tmp_path.iterdir())


BAD = [
    ("POST", "/v1/completions", b"{", 400, "not JSON"),
    ("POST", "/v1/completions", b"[" * 100_000, 400, "not JSON"),
    ("POST", "/v1/completions", b"\xff\xfe{}", 400, "not JSON"),
    ("POST", "/v1/completions", b"[]", 400, "must be a JSON object"),
    ("POST", "/v1/completions", {"prompt": "x"}, 400, "model must be"),
    ("POST", "/v1/completions", {"model": "nobody", "prompt": "x"}, 404, "no model 'nobody'"),
    ("POST", "/v1/completions", {"model": 3}, 400, "model must be"),
    ("POST", "/v1/completions", {"model": "generic", "prompt": 3}, 400, "prompt must be"),
    ("POST", "/v1/completions", {"model": "generic", "prompt": [1, 2]}, 400, "prompt must be"),
    ("POST", "/v1/completions", {"model": "generic", "prompt": []}, 400, "prompt must be"),
    ("POST", "/v1/completions", {"model": "generic", "prompt": ["x"] * 17}, 400, "1 to 16"),
    ("POST", "/v1/completions", {"model": "generic", "prompt": "\ud800"}, 400, "UTF-8"),
    ("POST", "/v1/completions", {"model": "generic", "max_tokens": 0}, 400, "max_tokens"),
    ("POST", "/v1/completions", {"model": "generic", "max_tokens": 65}, 400, "decoded here"),
    ("POST", "/v1/completions", {"model": "generic", "max_tokens": 1e9}, 400, "max_tokens"),
    ("POST", "/v1/completions", {"model": "generic", "max_tokens": True}, 400, "max_tokens"),
    ("POST", "/v1/completions", {"model": "generic", "temperature": -1}, 400, "temperature"),
    ("POST", "/v1/completions", b'{"model": "generic", "temperature": NaN}', 400, "NaN"),
    ("POST", "/v1/completions", {"model": "generic", "top_p": 0}, 400, "top_p"),
    ("POST", "/v1/completions", {"model": "generic", "n": 9}, 400, "n must be"),
    ("POST", "/v1/completions", {"model": "generic", "seed": "x"}, 400, "seed"),
    ("POST", "/v1/completions", {"model": "generic", "stop": [""]}, 400, "stop"),
    ("POST", "/v1/completions", {"model": "generic", "stop": ["a"] * 5}, 400, "1 to 4"),
    ("POST", "/v1/completions", {"model": "generic", "stream": "yes"}, 400, "stream"),
    ("POST", "/v1/completions", {"model": "generic", "logprobs": 5}, 400, "not served"),
    ("POST", "/v1/completions", {"model": "generic", "echo": True}, 400, "not served"),
    ("POST", "/v1/completions", {"model": "generic", "beams": 4}, 400, "unknown field 'beams'"),
    ("GET", "/v1/completions", None, 405, "not what this path takes"),
    ("POST", "/v1/specialists", {}, 400, "exactly one of"),
    ("POST", "/v1/specialists", {"documents": []}, 400, "documents must be"),
    ("POST", "/v1/specialists", {"documents": ["  "]}, 400, "not empty"),
    ("POST", "/v1/specialists", {"documents": [1]}, 400, "documents must be"),
    ("POST", "/v1/specialists", {"documents": ["x"] * 1001}, 400, "1 to 1000"),
    ("POST", "/v1/specialists", {"documents": ["x"], "name": "../x"}, 400, "name must be"),
    ("POST", "/v1/specialists", {"documents": ["x"], "name": "generic"}, 400, "taken"),
    ("POST", "/v1/specialists", {"h": [1, 2]}, 400, "h must be 6"),
    ("POST", "/v1/specialists", {"h": [0] * 6}, 400, "not all of them 0"),
    ("POST", "/v1/specialists", {"h": [-1, 2, 0, 0, 0, 0]}, 400, "at least 0"),
    ("POST", "/v1/specialists", {"alpha": [1e30, 0, 0, 0]}, 400, "above 1e6"),
    ("POST", "/v1/score", {"model": "generic"}, 400, "documents must be"),
    ("GET", "/v1/specialists/nobody", None, 404, "no model"),
    ("GET", "/nowhere", None, 404, "no such path"),
    ("GET", "/v1/models/nobody", None, 404, "no model"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "message"), BAD)
def test_bad_requests_are_refused(client, method, path, body, status, message):
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = {"content-type": "application/json"}
    answer = client.request(method, path, content=content, headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"]
    assert client.get("/health").json() == {"status": "ok"}


def test_bodies_of_other_kinds_and_sizes(client):
    answer = client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    large = json.dumps({"documents": ["x" * protocol.MAX_BODY_BYTES]}).encode()
    headers = {"content-type": "application/json"}
    assert client.post("/v1/specialists", content=large, headers=headers).status_code == 413
    body = {"model": "generic", "documents": ["x" * protocol.MAX_SCORED_BYTES, "x"]}
    answer = client.post("/v1/score", json=body)
    assert answer.status_code == 400
    assert "256 KiB" in answer.json()["error"]["message"]
    assert _completed(client, model="generic", prompt="x", max_tokens=2)["choices"]


def test_the_page_asks_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert page.text == (PAGE / "index.html").read_text()
    for name in ("app.js", "style.css"):
        assert client.get(f"/{name}").text == (PAGE / name).read_text()
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "").replace("http://...", "")
        assert "http:" not in text
        assert "https:" not in text


def test_other_hosts_and_tokens(soup):
    engine = Engine(soup, Limits())
    app = make_app(engine, token="secret-secret-secret", hosts=["localhost"])
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/v1/models").status_code == 401
        wrong = {"authorization": "Bearer secret-secret-secreT"}
        assert client.get("/v1/models", headers=wrong).status_code == 401
        right = {"authorization": "Bearer secret-secret-secret"}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.get("/").status_code == 200
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 400


def test_limits_and_many_clients_at_once(soup):
    alone = {n: soup.at(np.eye(6)[n]) for n in range(4)}
    size = sum(x.nbytes for x in _leaves(alone[0].params))
    # Room for about two: others are merged again when they are asked.
    limits = Limits(memory_bytes=int(2.5 * size), requests=12, rows=4, specialists=5)
    engine = Engine(soup, limits)
    with TestClient(make_app(engine), base_url="http://localhost") as client:
        for n in range(4):
            _made(client, name=f"s{n}", h=np.eye(6)[n].tolist())

        def ask(i: int):
            body = {"model": f"s{i % 4}", "prompt": f"butter {i}", "max_tokens": 20}
            return client.post("/v1/completions", json=body | {"temperature": 0})

        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(ask, range(24)))
        for i, answer in enumerate(answers):
            assert answer.status_code == 200
            text = alone[i % 4].generate(f"butter {i}", max_tokens=20, temperature=0)
            assert answer.json()["choices"][0]["text"] == text
        body = {"model": "s0", "prompt": ["x"] * 13, "max_tokens": 40}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert ask(0).status_code == 200  # what was taken on before the refusal was let go
        for n in range(4, 8):
            _made(client, name=f"s{n}", h=np.eye(6)[n % 6].tolist())
        names = {m["id"] for m in client.get("/v1/models").json()["data"]}
        assert len(names) == 7
        assert {"generic", "shared", "s7"} <= names


def test_networks_without_texts_under_way_make_room(soup):
    soup = soup.resident()
    networks = Networks(soup, memory_bytes=0, rows=1, text_len=32)
    alpha_NE = soup.coefficients(np.eye(6)[:4])
    for n in range(3):
        networks.submit(f"s{n}", alpha_NE[n], n, Request([5], max_tokens=3))
    assert networks.busy() == ["s0", "s1", "s2"]
    while busy := networks.busy():
        for place in busy:
            networks.get(place).advance()
    networks.submit("s3", alpha_NE[3], 3, Request([5], max_tokens=3))
    assert [n for n in range(4) if networks.get(f"s{n}")] == [3]


def test_texts_that_an_engine_cannot_take_are_refused_and_not_waited_for(soup):
    with pytest.raises(protocol.Refused, match="more than the 2 tokens"):
        Engine(soup, Limits(text_len=2))  # what it compiles by at its start is longer
    engine = Engine(soup, Limits(rows=1))
    with pytest.raises(protocol.Refused, match="max_tokens must be at least 1"):
        engine.complete("generic", Request([5], max_tokens=0), lambda *_: None)
    engine.close()


def test_low_rank_specialists_are_rows_of_one_batch(tiny_corpus, tmp_path):
    rules = (("layers/(attention|mlp)/.*", "low_rank:4"), (".*", "none"))
    fields = {"experts.rules": rules, "corpus.dir": tiny_corpus, "num_steps": 2}
    train(tiny_config(**fields, **{"optimizer.warmup_steps": 1}), tmp_path / "run")
    soup = load(tmp_path / "run")
    # Specialists that say different things.
    random = np.random.default_rng(0)
    noisy = [x + random.normal(size=x.shape).astype(x.dtype) for x in _leaves(soup.params["bank"])]
    bank = jax.tree.unflatten(jax.tree.structure(soup.params["bank"]), noisy)
    vars(soup)["params"] = soup.params | {"bank": bank}
    alone = [soup.at(np.eye(6)[n]) for n in range(4)]
    texts = [one.generate("butter", max_tokens=20, temperature=0) for one in alone]
    assert len(set(texts)) > 1
    engine = Engine(soup, Limits(rows=4))
    with TestClient(make_app(engine), base_url="http://localhost") as client:
        for n in range(4):
            _made(client, name=f"s{n}", h=np.eye(6)[n].tolist())

        def ask(i: int):
            body = {"model": f"s{i % 4}", "prompt": "butter", "max_tokens": 20, "temperature": 0}
            return client.post("/v1/completions", json=body)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(16)))
        assert [a.json()["choices"][0]["text"] for a in answers] == texts * 4
        scored = client.post("/v1/score", json={"model": "s1", "documents": ["butter"]}).json()
        expected = alone[1].score(["butter"])[0].loss
        assert scored["documents"][0]["loss"] == pytest.approx(expected, rel=1e-5)
        # Of a specialist that is removed the texts end, and those of the others go on.
        heard = {"s0": [], "s1": []}
        ended = threading.Semaphore(0)

        def listen(name, piece, reason, _):
            heard[name].append((piece, reason))
            if reason:
                ended.release()

        for name in heard:
            request = Request([0], max_tokens=60, sampling=Sampling(temperature=0))
            engine.complete(name, request, functools.partial(listen, name))
        engine.call(engine.forget, "s0").result()
        ended.acquire(timeout=60)
        ended.acquire(timeout=60)
        assert heard["s0"][-1] == ("the specialist was removed", "error")
        assert heard["s1"][-1][1] in ("stop", "length")
        assert len(engine._networks._made) == 1


def _leaves(params):
    return jax.tree.leaves(params)


def test_a_stream_that_nobody_reads_is_cancelled(soup):
    engine = Engine(soup)
    heard = []
    cancel = engine.complete("generic", Request([0], max_tokens=60), lambda *a: heard.append(a))
    cancel()
    engine.call(lambda: None).result()
    for _ in range(3):
        engine.call(lambda: None).result()
    assert engine._open == 0
    assert not engine._asked
    engine.close()


def test_who_is_told_the_address_can_connect(tiny_run, capsys, monkeypatch):
    def connect(server, sockets):
        port = int(re.search(r"serving on http://127.0.0.1:(\d+)", capsys.readouterr().out)[1])
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
        server.should_exit = True
        serve(server, sockets)

    serve = uvicorn.Server.run
    monkeypatch.setattr("uvicorn.Server.run", connect)
    # Of uvicorn, which would close pytest's own handlers.
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)
    assert main.run(["serve", f"--run={tiny_run}", "--port=0"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--run=RUN is required"),
        (["--host=0.0.0.0"], "opens the server to other machines"),
        (["--host=example.org"], "opens the server to other machines"),
        (["--token_file={folder}/short"], "at least 16 printable"),
        (["--token_file={folder}/none"], "does not exist"),
    ],
)
def test_mistakes_by_command(flags, message, tiny_run, tmp_path, capsys):
    (tmp_path / "short").write_text("abc")
    run = [f"--run={tiny_run}"] if flags else []
    given = [flag.format(folder=tmp_path) for flag in flags]
    assert main.run(["serve", *run, *given]) == 2
    assert message in capsys.readouterr().err
