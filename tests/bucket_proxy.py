"""A proxy in front of a server of S3 or GCS: fails where it is told to, and knows generations."""

import asyncio
import contextlib
import http.server
import json
import re
import socket
import threading
import types
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from soup_jax import remote

# Of a request for the content of an object of GCS.
_MEDIA = re.compile(r"/(?:download/)?storage/v1/b/([^/?]+)/o/([^/?]+)\?(?:.*&)?alt=media")


def give_up_soon(*, arrays: bool = True) -> None:
    """Let drivers of GCS try again as often as they do, but without pauses, and tensorstore, which
    writes `arrays`, twice, where it tries for a quarter of an hour."""
    import gcsfs.retry
    from orbax.checkpoint._src.serialization import tensorstore_utils

    async def at_once(_: float) -> None:
        await asyncio.sleep(0)

    gcsfs.retry.asyncio = types.SimpleNamespace(**{**vars(asyncio), "sleep": at_once})
    remote.PAUSE = 0.01
    few = {"max_retries": 2, "initial_delay": "10ms", "max_delay": "10ms"}
    for context in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT") if arrays else ():
        getattr(tensorstore_utils, context)["gcs_request_retries"] = few


class Faults:
    """What a proxy in front of a server does to requests: the next `left` of them fail, of those
    that have `only` in their path or body."""

    def __init__(self) -> None:
        self.kind, self.left, self.only, self.seen = "", 0, b"", 0
        self.over, self.stalled = threading.Event(), False  # whether a client waited too long

    @contextlib.contextmanager
    def of(self, kind: str, number: int, only: bytes = b"") -> Iterator[None]:
        self.kind, self.left, self.only = kind, number, only
        self.over.clear()
        yield
        self.over.set()
        self.kind, self.left, self.only = "", 0, b""


def proxy(port: int, faults: Faults) -> http.server.ThreadingHTTPServer:
    """Passes requests on to a server at a port, but for the faults.

    The emulator of GCS sends no generation with an object, and writes whatever the condition is. Of
    both depends that writers of one OCDBT database in tensorstore, as orbax has many, do not lose
    what another wrote; so they are made up for here.
    """
    lock = threading.Lock()

    def generation(bucket: str, name: str) -> str:
        try:
            url = f"http://127.0.0.1:{port}/storage/v1/b/{bucket}/o/{name}"
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["generation"]
        except urllib.error.HTTPError:
            return "0"  # there is none

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def body(self):
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def passed_on(self, body: bytes, headers: dict[str, str]):
            headers.setdefault("Content-Type", "application/octet-stream")  # else urllib has one
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}{self.path}", body or None, headers, method=self.command
            )
            try:
                answer = urllib.request.urlopen(request, timeout=30)
            except urllib.error.HTTPError as e:
                answer = e
            data = answer.read()
            return answer, data

        def handle_any(self):
            faults.seen += 1
            body = self.body()
            kind = faults.kind if faults.left > 0 else ""
            if faults.only not in urllib.parse.unquote_to_bytes(self.path) + body:
                kind = ""
            if kind and (kind.isdigit() or self.command == "GET"):
                faults.left -= 1
            else:
                kind = ""
            if kind.isdigit():
                self.send_response(int(kind))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            hop = ("connection", "transfer-encoding", "content-length", "expect")
            headers = {k: v for k, v in self.headers.items() if k.lower() not in hop}
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            media = _MEDIA.match(self.path) if self.command == "GET" else None
            with lock if media or self.command in ("POST", "PUT") else contextlib.nullcontext():
                if "ifGenerationMatch" in query and "name" in query:
                    bucket = url.path.split("/b/")[1].partition("/")[0]
                    name = urllib.parse.quote(query["name"], safe="")
                    if generation(bucket, name) != query["ifGenerationMatch"]:
                        self.send_response(412)
                        self.send_header("Content-Length", "0")
                        self.end_headers()
                        return
                answer, data = self.passed_on(body, headers)
                found = generation(*media.groups()) if media else ""
            self.send_response(answer.status)
            if found not in ("", "0"):
                self.send_header("x-goog-generation", found)
            for name, value in answer.headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = answer.headers.get("Content-Length") if self.command == "HEAD" else len(data)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if kind == "cut":  # in the middle of the body
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            if kind == "stall":  # likewise, and nothing more
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                faults.stalled |= not faults.over.wait(20)
                self.close_connection = True
                return
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
