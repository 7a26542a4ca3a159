"""A server process asked by the client of OpenAI, by one and by many at once.

Slow; needs `pip install openai`.
"""

import concurrent.futures
import json

import numpy as np
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

pytestmark = pytest.mark.slow


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def _make(client, **body):
    return client.post("/specialists", body=body, cast_to=object)


def test_one_client_makes_completes_and_streams(client, tiny_text):
    lines = (tiny_text / "cooking.jsonl").read_text().splitlines()
    made = _make(client, name="cooking", documents=[json.loads(x)["text"] for x in lines])
    assert made["documents"] == len(lines)
    assert {"generic", "shared", "cooking"} <= {m.id for m in client.models.list()}
    assert client.models.retrieve("cooking").owned_by == "soup_jax"
    asked = {"model": "cooking", "prompt": "butter", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text
    assert whole.usage.completion_tokens > 1
    _make(client, name="again", alpha=made["alpha"])
    assert client.completions.create(**asked | {"model": "again"}).choices == whole.choices
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = client.completions.create(**asked, **options)
    assert "".join(e.choices[0].text for e in events) == whole.choices[0].text
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage


def test_refusals_are_the_clients_exceptions(client):
    with pytest.raises(openai.NotFoundError) as refusal:
        client.completions.create(model="nobody", prompt="butter")
    assert refusal.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_tokens") as refusal:
        client.completions.create(model="generic", prompt="butter", max_tokens=0)
    assert refusal.value.param == "max_tokens"


def test_many_clients_at_once_hear_what_one_hears(client):
    rng = np.random.default_rng(0)
    for n in range(8):
        _make(client, name=f"s{n}", h=rng.dirichlet(np.ones(6)).tolist())

    def ask(i):
        asked = client.completions.create(
            model=f"s{i % 8}", prompt=f"butter {i}", max_tokens=20, temperature=0
        )
        return asked.choices[0].text

    alone = [ask(i) for i in range(40)]
    assert len(set(alone)) > 20
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, range(40))) == alone
