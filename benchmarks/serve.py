"""Throughput and latency of a served soup, beside `generate` called one by one.

    pip install 'soup_jax[serve]' openai
    python benchmarks/serve.py --run=RUN --documents='DIR/*.jsonl'

Starts `soup-jax serve`, makes a specialist of each of the first files, and lets clients (the openai
package, a thread each) complete prompts with them, streaming, in as many rows as there are clients.
A part of the same requests goes to `Specialist.generate`, one after the other, in this process,
before and after: rounds of both take turns on the same processors, which the other leaves alone.
"""

import argparse
import concurrent.futures
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import numpy as np
import openai

from soup_jax.evaluation.sample import read_sample
from soup_jax.evaluation.sets import document_sets
from soup_jax.specialists.open import load


def started(run: str, corpus: str, rows: int, log: pathlib.Path) -> tuple[subprocess.Popen, str]:
    """The server and its address."""
    command = [sys.executable, "-m", "soup_jax.cli", "serve", f"--run={run}", "--port=0"]
    with log.open("w") as f:
        server = subprocess.Popen(
            [*command, f"--corpus={corpus}", f"--rows={rows}"], stdout=f, stderr=f
        )
    while server.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("serving on "):
                return server, line.split()[2]
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def ask(client: openai.OpenAI, work: tuple[str, str, int], tokens: int) -> tuple[float, int]:
    """(seconds to the first text, tokens) of one streamed completion of (model, prompt, seed)."""
    (name, prompt, seed), begin, first, used = work, time.monotonic(), 0.0, 0
    for event in client.completions.create(
        model=name,
        prompt=prompt,
        max_tokens=tokens,
        seed=seed,
        stream=True,
        stream_options={"include_usage": True},
    ):
        if event.choices and event.choices[0].text and not first:
            first = time.monotonic() - begin
        if event.usage:
            used = event.usage.completion_tokens
    return first or time.monotonic() - begin, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--corpus", default="", help="if it was moved")
    parser.add_argument("--documents", required=True, help="a glob; each file is a specialist")
    parser.add_argument("--specialists", type=int, default=8)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    soup = load(given.run, corpus_dir=given.corpus)
    paths = list(document_sets([given.documents]).items())[: given.specialists]
    texts = {
        name: [d.text for d in read_sample([path], text_field="text").documents][:20]
        for name, path in paths
    }
    work = []
    for i in range(given.requests):
        name = list(texts)[i % len(texts)]
        work.append((name, " ".join(texts[name][i % len(texts[name])].split()[:6]), i))
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "log"
        server, address = started(given.run, given.corpus, given.clients, log)
        try:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
            made = []
            for name, documents in texts.items():
                begin = time.monotonic()
                body = {"name": name, "documents": documents}
                client.post("/specialists", body=body, cast_to=object)
                made.append(time.monotonic() - begin)

            def ask_all() -> list[tuple[float, int]]:
                with concurrent.futures.ThreadPoolExecutor(given.clients) as pool:
                    return list(pool.map(lambda w: ask(client, w, given.tokens), work))

            specialists = {name: soup.instantiate(documents) for name, documents in texts.items()}
            # Alone a part of them, drawn at random, so that both take about as long.
            part = random.Random(0).sample(work, min(given.clients, len(work)))

            def generate() -> int:
                tokens = 0
                for name, prompt, seed in part:
                    text = specialists[name].generate(
                        prompt, max_tokens=given.tokens, temperature=1.0, seed=seed
                    )
                    tokens += len(specialists[name].tokenizer.encode(text))
                return tokens

            ask_all(), generate()  # compiles
            first, rates = [], []
            for _ in range(given.rounds):
                begin = time.monotonic()
                answers = ask_all()
                middle = time.monotonic()
                alone = generate() / (time.monotonic() - middle)
                rates.append((sum(tokens for _, tokens in answers) / (middle - begin), alone))
                first += [1000 * t for t, _ in answers]
        finally:
            server.terminate()
            server.wait(30)
    median, *high = np.percentile(first, [50, 90, 99])
    print(f"{given.clients} clients, {len(texts)} specialists, {given.requests} requests")
    print(f"specialist from 20 documents: median {1000 * np.median(made):.0f} ms")
    print(f"first text: median {median:.0f} ms, 90% {high[0]:.0f} ms, 99% {high[1]:.0f} ms")
    for served, alone in rates:
        ratio = served / alone
        print(f"served {served:,.0f} tokens/s, generate one by one {alone:,.0f}: {ratio:.1f}x")
    print(f"median {np.median([served / alone for served, alone in rates]):.1f}x")


if __name__ == "__main__":
    main()
