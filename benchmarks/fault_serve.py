"""What `faults.py kills` asks of a server: a specialist, a completion and a download."""

import hashlib
import http.client
import io
import json
import pathlib
import signal
import time
import urllib.request
import zipfile
from typing import Any


def ask(process: Any, out: pathlib.Path, log: pathlib.Path, documents: pathlib.Path) -> None:
    """Wait until it serves, add its answers to what it printed, and interrupt it.

    One that cannot be asked is killed, if it is not dead already, and the log says why.
    """
    while "(Ctrl-C" not in out.read_text():
        if process.poll() is not None:
            return
        time.sleep(0.02)
    try:
        found = answers(out.read_text().partition("serving on ")[2].split()[0], documents)
    except (OSError, http.client.HTTPException) as e:
        log.write_text(f"{log.read_text()}{e!r}\n")
        process.kill()
        return
    with out.open("a") as f:
        f.write(json.dumps(found) + "\n")
    process.send_signal(signal.SIGINT)


def answers(address: str, documents: pathlib.Path) -> dict[str, Any]:
    """What the server says, without times; a zip as hashes of its files.

    Raises:
      OSError, http.client.HTTPException: it refused, or was killed.
    """

    def ask(path: str, body: Any = None) -> bytes:
        data = json.dumps(body).encode() if body else None
        headers = {"Content-Type": "application/json"} if body else {}
        request = urllib.request.Request(f"{address}/v1/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()

    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    made = json.loads(ask("specialists", {"name": "made", "documents": texts}))
    body = {"model": "made", "prompt": "butter flour", "max_tokens": 20, "temperature": 0}
    completed = json.loads(ask("completions", body))
    with zipfile.ZipFile(io.BytesIO(ask("specialists/made/download"))) as folder:
        files = {n: hashlib.sha256(folder.read(n)).hexdigest() for n in folder.namelist()}
    return {
        "made": {name: made[name] for name in ("h", "alpha", "documents", "warnings")},
        "completed": {name: completed[name] for name in ("choices", "usage")},
        "files": files,
    }
