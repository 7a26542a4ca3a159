"""The HTTP face of an engine: the OpenAI protocol of models and completions, specialists, a page.

GET  /v1/models                      all specialists, `generic` and `shared` among them
POST /v1/specialists                 {"documents": [...]} (or "h", "alpha"; "name" if wanted)
GET  /v1/specialists/NAME            its domain weights and coefficients; DELETE forgets it
GET  /v1/specialists/NAME/download   a folder for transformers, zipped
POST /v1/completions                 {"model": NAME, "prompt": TEXT, ...}, streaming too
POST /v1/score                       {"model": NAME, "documents": [...]}: losses
GET  /health, and / is a page to try it
"""

import asyncio
import contextlib
import hmac
import importlib.resources
import pathlib
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from soup_jax.errors import UserError
from soup_jax.evaluation.score import Score, total
from soup_jax.specialists.serve import protocol
from soup_jax.specialists.serve.engine import Described, Engine
from soup_jax.specialists.serve.protocol import Refused
from soup_jax.specialists.serve.texts import Texts
from soup_jax.storage import nulled, temporary_folder

_BODY_SECONDS = 30.0
_SCORED_TOGETHER = 8
_PAGES = {"": "index.html", "app.js": "app.js", "style.css": "style.css"}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_DOWNLOADS = "soup_jax-download"
_ERRORS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
Handler = Callable[[Request], Awaitable[Response]]


def make_app(engine: Engine, *, token: str = "", hosts: Sequence[str] = ("*",)) -> Starlette:
    """The application.

    Args:
      token: that requests below /v1 must bear; "" asks for none.
      hosts: names in the Host header that are answered, "*" for all.
    """
    service = _Service(engine, token)
    routes = [
        *(Route(f"/{path}", service.page, methods=["GET"]) for path in _PAGES),
        Route("/favicon.ico", service.no_icon, methods=["GET"]),
        Route("/health", service.health, methods=["GET"]),
        Route("/v1/models", service.guarded(service.models), methods=["GET"]),
        Route("/v1/models/{name}", service.guarded(service.model), methods=["GET"]),
        Route("/v1/domains", service.guarded(service.domains), methods=["GET"]),
        Route("/v1/specialists", service.guarded(service.make), methods=["POST"]),
        Route("/v1/specialists/{name}", service.guarded(service.show), methods=["GET"]),
        Route("/v1/specialists/{name}", service.guarded(service.forget), methods=["DELETE"]),
        Route(
            "/v1/specialists/{name}/download", service.guarded(service.download), methods=["GET"]
        ),
        Route("/v1/completions", service.guarded(service.complete), methods=["POST"]),
        Route("/v1/score", service.guarded(service.score), methods=["POST"]),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        del app
        with contextlib.suppress(OSError), temporary_folder(_DOWNLOADS):
            pass  # those of killed servers are gone
        yield
        await run_in_threadpool(engine.close)

    handlers: Any = {Refused: _refused, HTTPException: _http_error, Exception: _broken}
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers=handlers,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )


def _error(status: int, message: str, *, code: str = "", param: str = "") -> Response:
    kind = _ERRORS.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param or None, "code": code or None}
    headers = {**_HEADERS, **({"Retry-After": "1"} if status == 429 else {})}
    return JSONResponse({"error": error}, status, headers=headers)


async def _refused(request: Request, error: Refused) -> Response:
    del request
    return _error(error.status, str(error), code=error.code, param=error.param)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = {404: "there is no such path", 405: f"{request.method} is not what this path takes"}
    return _error(error.status_code, message.get(error.status_code, error.detail))


async def _broken(request: Request, error: Exception) -> Response:
    del request
    return _error(500, f"the server failed: {type(error).__name__}")


class _Service:
    def __init__(self, engine: Engine, token: str):
        self._engine = engine
        self._token = token.encode()
        self._downloads = asyncio.Semaphore(1)

    def guarded(self, handler: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            if self._token and not hmac.compare_digest(given, self._token):
                raise Refused(401, "this server wants its token: Authorization: Bearer TOKEN")
            response = await handler(request)
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
            return response

        return checked

    async def _on_engine(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return await asyncio.wrap_future(self._engine.call(function, *args))
        except UserError as e:
            raise Refused(400, str(e)) from e

    async def page(self, request: Request) -> Response:
        """The page and what belongs to it."""
        name = _PAGES[request.url.path.lstrip("/")]
        folder = importlib.resources.files("soup_jax.specialists.serve") / "page"
        kind = _TYPES[pathlib.PurePath(name).suffix]
        return Response((folder / name).read_bytes(), media_type=kind, headers=_HEADERS)

    async def no_icon(self, request: Request) -> Response:
        """Browsers ask for it."""
        del request
        return Response(status_code=204, headers=_HEADERS)

    async def health(self, request: Request) -> Response:
        """Whether it answers."""
        del request
        return JSONResponse({"status": "ok"}, headers=_HEADERS)

    async def models(self, request: Request) -> Response:
        """All specialists."""
        del request
        found = await self._on_engine(self._engine.described)
        return JSONResponse({"object": "list", "data": [_as_model(d) for d in found]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        found = await self._on_engine(self._engine.find, request.path_params["name"])
        return JSONResponse(_as_model(found))

    async def domains(self, request: Request) -> Response:
        """Labels and natural frequencies of the domains, and what the soup is."""
        del request
        soup = self._engine.soup
        frequencies = [float(x) for x in soup.map.domain_frequencies]
        return JSONResponse(
            {
                "name": soup.cfg.name,
                "step": soup.step,
                "num_experts": soup.num_experts,
                "domains": soup.domains,
                "frequencies": frequencies,
                "text_len": self._engine.text_len,
            }
        )

    async def make(self, request: Request) -> Response:
        """A new specialist."""
        soup = self._engine.soup
        asked = protocol.specialist(
            await _body(request), num_domains=soup.num_domains, num_experts=soup.num_experts
        )
        begin = time.monotonic()
        if texts := asked.pop("texts", ()):
            asked["histogram"] = await run_in_threadpool(self._engine.histogram, texts)
        made = await self._on_engine(lambda: self._engine.make(**asked))
        seconds = time.monotonic() - begin
        return JSONResponse({**self._shown(made), "seconds": seconds}, 201)

    async def show(self, request: Request) -> Response:
        """What a specialist is."""
        found = await self._on_engine(self._engine.find, request.path_params["name"])
        return JSONResponse(self._shown(found))

    async def forget(self, request: Request) -> Response:
        """Remove a specialist."""
        name = request.path_params["name"]
        await self._on_engine(self._engine.forget, name)
        return JSONResponse({"id": name, "object": "specialist", "deleted": True})

    def _shown(self, found: Described) -> dict[str, Any]:
        histogram = found.histogram
        return {
            **_as_model(found),
            "object": "specialist",
            "h": [float(x) for x in found.h_K],
            "alpha": [float(x) for x in found.alpha_E],
            "documents": histogram.num_documents if histogram else 0,
            "warnings": histogram.warnings() if histogram else [],
        }

    async def score(self, request: Request) -> Response:
        """Losses of documents."""
        name, texts = protocol.scored(await _body(request))
        scores: list[Score] = []
        for start in range(0, len(texts), _SCORED_TOGETHER):  # texts under way go on in between
            part = texts[start : start + _SCORED_TOGETHER]
            scores += await self._on_engine(self._engine.score, name, part)
        result = {
            "object": "score",
            "model": name,
            "documents": [s.numbers() for s in scores],
            "total": total(scores).numbers(),
        }
        return JSONResponse(nulled(result))

    async def download(self, request: Request) -> Response:
        """A specialist's folder in the format "hf", zipped."""
        name = request.path_params["name"]
        found = await self._on_engine(self._engine.specialist, name)
        with contextlib.ExitStack() as stack:
            async with self._downloads:
                folder = stack.enter_context(temporary_folder(_DOWNLOADS))
                try:
                    path = await run_in_threadpool(_zipped, found, folder, name)
                except UserError as e:
                    raise Refused(400, str(e)) from e
            return FileResponse(
                path,
                media_type="application/zip",
                filename=f"{name}.zip",
                background=BackgroundTask(stack.pop_all().close),
            )

    async def complete(self, request: Request) -> Response:
        """Continue prompts."""
        asked = protocol.completion(await _body(request))
        await self._on_engine(self._engine.find, asked.model)
        encode = self._engine.tokenizer.encode_batch
        prompts = await run_in_threadpool(encode, asked.prompts)
        texts = Texts(self._engine, asked, prompts)
        if asked.stream:
            return StreamingResponse(texts.events(), media_type="text/event-stream")
        return JSONResponse(await texts.whole(request))


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a browser sends it to another origin after a question only
        raise Refused(415, "the body must be JSON, with Content-Type: application/json")
    most = protocol.MAX_BODY_BYTES
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise Refused(413, f"the body has more than {most >> 20} MiB")
                parts.append(part)
    except TimeoutError as e:
        raise Refused(408, f"the body did not come within {_BODY_SECONDS:.0f} seconds") from e
    return b"".join(parts)


def _as_model(found: Described) -> dict[str, Any]:
    return {
        "id": found.name,
        "object": "model",
        "created": found.created,
        "owned_by": "soup_jax",
    }


def _zipped(specialist: Any, folder: pathlib.Path, name: str) -> str:
    specialist.save(folder / name, format="hf")
    return shutil.make_archive(str(folder / "made"), "zip", folder, name)
