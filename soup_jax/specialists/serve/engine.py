"""A soup at work: specialists made from its resident bank, and their texts decoded together.

One thread owns all that is on the devices. Others hand it functions (`call`) and requests
(`complete`); between two rounds it does what was handed in, and a round adds some tokens to the
texts of every specialist that has any. What describes a specialist, its coefficients, is E numbers
and is kept; its parameters are made when they are needed (`networks`).
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from soup_jax.data.domain_histogram import DocumentHistogram, document_histogram
from soup_jax.errors import UserError
from soup_jax.evaluation.score import Score, score_texts
from soup_jax.specialists.generate import Batch, Request, Text, check
from soup_jax.specialists.serve.networks import Networks
from soup_jax.specialists.serve.protocol import Refused
from soup_jax.specialists.specialist import Specialist
from soup_jax.specialists.trained import Soup

_log = logging.getLogger(__name__)

GENERIC, SHARED = "generic", "shared"  # specialists that are always there


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one engine takes on.

    Attributes:
      memory_bytes: of merged parameters and caches; at least one specialist is kept.
      specialists: that are described; the one that was not asked for longest is forgotten.
      requests: texts that wait or are being decoded.
      rows: texts of a network that are decoded together.
      text_len: tokens of a prompt and what is added to it; 0: twice the training windows.
    """

    memory_bytes: int = 4 << 30
    specialists: int = 1000
    requests: int = 256
    rows: int = 16
    text_len: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Described:
    """A specialist as its coefficients."""

    name: str
    h_K: np.ndarray
    alpha_E: np.ndarray
    histogram: DocumentHistogram | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


@dataclasses.dataclass(kw_only=True)
class _Asked:
    # A text under way.
    name: str
    text: Text
    listen: Callable[[str, str, int], None]
    tokens: int = 0


class Engine:
    """The thread and what it owns; `close` ends it."""

    def __init__(self, soup: Soup, limits: Limits = Limits()):
        """Reads the bank to the devices.

        Raises:
          UserError: the soup cannot be read, or its network is no language model.
        """
        if soup.model.logits is None:
            raise UserError("this soup's network is no language model: there is nothing to serve")
        self.soup = soup.resident()
        self.limits = limits
        self.text_len = limits.text_len or 2 * self.soup.cfg.seq_len
        self.tokenizer = self.soup.map.tokenizer()
        self._known: collections.OrderedDict[str, Described] = collections.OrderedDict()
        self._networks = Networks(
            self.soup,
            memory_bytes=limits.memory_bytes,
            rows=limits.rows,
            text_len=self.text_len,
        )
        self._asked: dict[int, _Asked] = {}
        self._numbers = itertools.count()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open = 0  # requests that were taken on and have not ended
        self._lock = threading.Lock()
        frequencies_K = self.soup.map.domain_frequencies
        alpha_E = self.soup.coefficients(frequencies_K[None])[0]
        for name, alpha in ((GENERIC, alpha_E), (SHARED, np.zeros_like(alpha_E))):
            self._known[name] = Described(name=name, h_K=frequencies_K, alpha_E=alpha)
        self._thread = threading.Thread(target=self._run, name="soup", daemon=True)
        self._thread.start()
        self._warm()

    def _warm(self) -> None:
        # Compile what the first texts would wait for, for each number of rows; longer prompts and
        # texts compile when they come.
        request = Request([self.soup.map.eos_id], max_tokens=2)
        ended = threading.Semaphore(0)

        def listen(_: str, reason: str, __: int) -> None:
            if reason:
                ended.release()

        def ask(number: int) -> None:
            for _ in range(number):
                self.complete(GENERIC, request, listen)

        number, most = 1, min(self.limits.rows, self.limits.requests)
        while number <= most:
            self.call(ask, number).result()  # on the thread, which so takes them together
            for _ in range(number):
                ended.acquire()
            number = most if number < most < 4 * number else 4 * number

    def histogram(self, texts: Sequence[str]) -> DocumentHistogram:
        """Of documents; for any thread, as nothing on the devices is needed for it.

        Raises:
          UserError: no documents.
        """
        return document_histogram(self.soup.map, texts)

    def close(self) -> None:
        """End the thread; texts under way end where they are."""
        self._jobs.put(None)
        self._thread.join(30)

    def call(self, function: Callable[..., Any], *args: Any) -> concurrent.futures.Future:
        """Run a function on the engine's thread."""
        future: concurrent.futures.Future = concurrent.futures.Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args))
            except BaseException as e:
                future.set_exception(e)

        self._jobs.put(job)
        return future

    # What follows runs on the engine's thread, through `call`.

    def described(self) -> list[Described]:
        """All specialists."""
        return list(self._known.values())

    def find(self, name: str) -> Described:
        """One of them.

        Raises:
          Refused: 404.
        """
        if name not in self._known:
            raise Refused(
                404,
                f"there is no model {name!r} here: POST /v1/specialists makes one, GET /v1/models "
                "lists them",
                code="model_not_found",
                param="model",
            )
        self._known.move_to_end(name)
        return self._known[name]

    def make(
        self,
        *,
        name: str = "",
        histogram: DocumentHistogram | None = None,
        h_K: np.ndarray | None = None,
        alpha_E: np.ndarray | None = None,
    ) -> Described:
        """A specialist of documents' histogram, of domain weights or of coefficients; an older one
        of that name is replaced.

        Raises:
          Refused: the name of one that is always there.
        """
        if name in (GENERIC, SHARED):
            raise Refused(400, f"the name {name!r} is taken by the soup itself", param="name")
        weights_K = histogram.h_K if histogram else h_K
        if weights_K is None:
            weights_K = self.soup.map.domain_frequencies
        if alpha_E is None:
            alpha_E = self.soup.coefficients(weights_K[None])[0]
        digest = hashlib.sha256(np.concatenate([weights_K, alpha_E]).tobytes()).hexdigest()
        made = Described(
            name=name or f"specialist-{digest[:12]}",
            h_K=weights_K,
            alpha_E=alpha_E,
            histogram=histogram,
        )
        if (old := self._known.get(made.name)) and old.alpha_E.tobytes() != alpha_E.tobytes():
            self._drop(made.name)
        self._known[made.name] = made
        self._known.move_to_end(made.name)
        while len(self._known) > self.limits.specialists + 2:
            oldest = next(n for n in self._known if n not in (GENERIC, SHARED, made.name))
            self.forget(oldest)
        return made

    def forget(self, name: str) -> None:
        """Remove a specialist; its texts end.

        Raises:
          Refused: 404, or one that is always there.
        """
        if name in (GENERIC, SHARED):
            raise Refused(400, f"{name!r} is the soup itself", param="model")
        self.find(name)
        self._drop(name)
        del self._known[name]

    def specialist(self, name: str) -> Specialist:
        """It as an object that can be saved."""
        found = self.find(name)
        histograms = [found.histogram]
        (made,) = self.soup.make(found.h_K[None], found.alpha_E[None], histograms=histograms)
        return made

    def score(self, name: str, texts: Sequence[str]) -> list[Score]:
        """Of each text by a specialist."""
        return score_texts(
            self.soup.model,
            self.soup.on_devices(self.find(name).alpha_E),
            self.tokenizer,
            texts,
            eos_id=self.soup.map.eos_id,
            seq_len=self.soup.cfg.seq_len,
        )

    # Texts.

    def complete(
        self, name: str, request: Request, listen: Callable[[str, str, int], None]
    ) -> Callable[[], None]:
        """Queue a text; returns what cancels it. May be called on any thread.

        Args:
          listen: called on the engine's thread with (more text, why it ended or "", tokens so far);
            the reasons are "stop", "length" and "error".

        Raises:
          Refused: too many requests, or settings that mean nothing.
        """
        try:
            check(request)
        except UserError as e:
            raise Refused(400, str(e)) from e
        if not request.max_tokens:
            raise Refused(400, "max_tokens must be at least 1", param="max_tokens")
        prompt = min(len(request.prompt_ids), self.soup.cfg.seq_len)
        if prompt + request.max_tokens > self.text_len:
            raise Refused(
                400,
                f"max_tokens = {request.max_tokens} after a prompt of {prompt} tokens is more than "
                f"the {self.text_len} tokens that are decoded here",
                param="max_tokens",
            )
        with self._lock:
            if self._open >= self.limits.requests:
                raise Refused(
                    429, f"{self._open} texts are waiting already: try again", code="queue_full"
                )
            self._open += 1
        number = next(self._numbers)

        def submit() -> None:
            try:
                self._networks.submit(name, self.find(name).alpha_E, number, request)
            except Exception as e:
                self._end()
                listen(str(e), "error", 0)
                return
            self._asked[number] = _Asked(
                name=name, text=Text(self.tokenizer, request.stop), listen=listen
            )

        def cancel() -> None:
            if self._asked.pop(number, None) is not None:
                self._end()
                if batch := self._networks.get(self._networks.place(name)):
                    batch.drop(number)

        self._jobs.put(submit)
        return lambda: self._jobs.put(cancel)

    def _end(self) -> None:
        with self._lock:
            self._open -= 1

    def _run(self) -> None:
        while True:
            busy = self._networks.busy()
            while True:
                try:
                    job = self._jobs.get(block=not busy)
                except queue.Empty:
                    break
                if job is None:
                    for number in list(self._asked):
                        self._finish(number, "", "error")
                    return
                job()
                busy = self._networks.busy()
            # All of them are started before the first is waited for: the devices do not idle.
            for step in (lambda batch: batch.start(), self._collect):
                for place in busy:
                    batch = self._networks.get(place)
                    try:
                        if batch is not None:
                            step(batch)
                    except Exception as e:  # the service goes on
                        _log.exception("decoding with %s failed", place or "the soup")
                        self._networks.fail(place)
                        for number, asked in list(self._asked.items()):
                            if self._networks.place(asked.name) == place:
                                self._finish(number, str(e), "error")

    def _collect(self, batch: Batch) -> None:
        eos_id = self.soup.map.eos_id
        for number, ids, ended in batch.finish():
            asked = self._asked.get(number)
            if asked is None:
                continue
            asked.tokens += len(ids)
            piece = asked.text.add(i for i in ids if i != eos_id)
            if asked.text.stopped:
                batch.drop(number)
                self._finish(number, piece, "stop")
            elif ended:
                piece += asked.text.rest()
                stopped = asked.text.stopped or ids[-1] == eos_id
                self._finish(number, piece, "stop" if stopped else "length")
            elif piece:
                asked.listen(piece, "", asked.tokens)

    def _finish(self, number: int, piece: str, reason: str) -> None:
        asked = self._asked.pop(number)
        self._end()
        asked.listen(piece, reason, asked.tokens)

    def _drop(self, name: str) -> None:
        self._networks.forget(name)
        batch = self._networks.get(self._networks.place(name))
        for number in [n for n, asked in self._asked.items() if asked.name == name]:
            if batch is not None:
                batch.drop(number)
            self._finish(number, "the specialist was removed", "error")
