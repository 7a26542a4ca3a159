"""The texts of one request for completions, whole or as server-sent events."""

import asyncio
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request

from soup_jax.specialists.generate import Request as TextRequest
from soup_jax.specialists.serve import protocol
from soup_jax.specialists.serve.engine import Engine
from soup_jax.specialists.serve.protocol import Refused


class Texts:
    """The texts of one request, as they come from the engine's thread."""

    def __init__(
        self, engine: Engine, asked: protocol.Completion, prompts: Sequence[Sequence[int]]
    ):
        """Hands the prompts to the engine.

        Args:
          prompts: ids of each, without the end-of-text token that goes before.

        Raises:
          Refused: as `Engine.complete`.
        """
        self._asked = asked
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, str, str, int]] = asyncio.Queue()
        self._cancels: list[Callable[[], None]] = []
        self._head = {
            "id": f"cmpl-{os.urandom(12).hex()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
        }
        self._tokens: dict[int, int] = {}
        eos_id = engine.soup.map.eos_id
        self._num = len(prompts) * asked.n
        self._prompt_tokens = sum(map(len, prompts))
        try:
            for index in range(self._num):
                seed = (asked.sampling.seed + index) % (1 << 32)
                sampling = dataclasses.replace(asked.sampling, seed=seed)
                ids = [eos_id, *prompts[index // asked.n]]
                text = TextRequest(ids, asked.max_tokens, sampling, asked.stop)
                self._cancels.append(engine.complete(asked.model, text, self._listener(index)))
        except Refused:
            self._cancel()
            raise

    def _listener(self, index: int) -> Callable[[str, str, int], None]:
        def listen(piece: str, reason: str, tokens: int) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
                self._loop.call_soon_threadsafe(
                    self._queue.put_nowait, (index, piece, reason, tokens)
                )

        return listen

    def _cancel(self) -> None:
        for cancel in self._cancels:
            cancel()

    async def _pieces(self) -> AsyncIterator[tuple[int, str, str]]:
        left = self._num
        try:
            while left:
                index, piece, reason, tokens = await self._queue.get()
                self._tokens[index] = tokens
                left -= bool(reason)
                yield index, piece, reason
        finally:
            self._cancel()

    def _usage(self) -> dict[str, int]:
        made = sum(self._tokens.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self._prompt_tokens + made,
        }

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer once all texts have ended; cancelled if nobody waits for it."""
        gone = asyncio.ensure_future(_gone(request))
        texts, reasons = [""] * self._num, [""] * self._num

        async def collect() -> None:
            async for index, piece, reason in self._pieces():
                if reason == "error":
                    raise Refused(500, piece)
                texts[index] += piece
                reasons[index] = reason

        work = asyncio.ensure_future(collect())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            await work
        finally:
            gone.cancel()
            work.cancel()
            self._cancel()
        choices = [
            {"index": i, "text": text, "finish_reason": reason, "logprobs": None}
            for i, (text, reason) in enumerate(zip(texts, reasons))
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, one for each piece."""
        async for index, piece, reason in self._pieces():
            if reason == "error":
                error = {"message": piece, "type": "server_error", "param": None, "code": None}
                yield _event({"error": error})
                return
            choice = {"index": index, "text": piece, "finish_reason": reason or None}
            yield _event({**self._head, "choices": [{**choice, "logprobs": None}]})
        if self._asked.usage:
            yield _event({**self._head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
