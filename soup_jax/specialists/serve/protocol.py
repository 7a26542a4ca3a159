"""Bodies of requests as values: what may be asked, and what is refused with which status."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from soup_jax.specialists.decoding import Sampling

MAX_BODY_BYTES = 8 << 20
MAX_DOCUMENTS = 1000
MAX_SCORED_BYTES = 256 << 10
MAX_PROMPTS = 16
MAX_CHOICES = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Fields of the OpenAI protocol that change the answer and are not served: only their neutral values
# are taken. What is in neither list is unknown.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}
_IGNORED = ("user",)


class Refused(Exception):
    """A request that is not served, as an HTTP status and a sentence."""

    def __init__(self, status: int, message: str, *, code: str = "", param: str = ""):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """The body of /v1/completions."""

    model: str
    prompts: list[str]
    n: int
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    usage: bool  # of a stream, in a chunk of its own


def parse(body: bytes, known: Sequence[str]) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
      Refused: 400, and which field is unknown.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:
        raise Refused(400, f"the body is not JSON in UTF-8: {e or 'nested too deeply'}") from e
    if not isinstance(value, dict):
        raise Refused(400, "the body must be a JSON object")
    if unknown := sorted(value.keys() - set(known)):
        raise Refused(
            400,
            f"unknown field {unknown[0]!r}; known are {', '.join(known)}",
            param=unknown[0],
        )
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _number(value: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    found = value.get(name)
    found = default if found is None else found
    if type(found) not in (int, float) or not math.isfinite(found) or not low <= found <= high:
        raise Refused(400, f"{name} must be a number from {low:g} to {high:g}", param=name)
    return float(found)


def _integer(value: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    found = value.get(name)
    found = default if found is None else found
    if type(found) is not int or not low <= found <= high:
        raise Refused(400, f"{name} must be an integer from {low} to {high}", param=name)
    return found


def _flag(value: Mapping[str, Any], name: str) -> bool:
    found = value.get(name)
    if found not in (None, True, False):
        raise Refused(400, f"{name} must be true or false", param=name)
    return bool(found)


def _texts(found: Any, name: str, most: int, *, empty: bool) -> list[str]:
    found = [found] if isinstance(found, str) else found
    good = isinstance(found, list) and 0 < len(found) <= most
    if not good or not all(isinstance(t, str) and (empty or t.strip()) for t in found):
        what = "texts" if empty else "texts that are not empty"
        raise Refused(400, f"{name} must be a text, or 1 to {most} {what}", param=name)
    for text in found:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise Refused(400, f"{name} has text that UTF-8 cannot hold", param=name) from e
    return found


def completion(body: bytes) -> Completion:
    """The request of /v1/completions.

    Raises:
      Refused: 400, and which field.
    """
    fields = ("model", "prompt", "n", "max_tokens", "temperature", "top_p", "seed", "stop")
    value = parse(body, (*fields, "stream", "stream_options", *_NEUTRAL, *_IGNORED))
    for name, neutral in _NEUTRAL.items():
        if name in value and not any(value[name] == x for x in neutral):
            raise Refused(400, f"{name} is not served here: leave it out", param=name)
    options = value.get("stream_options") or {}
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise Refused(400, "stream_options may have include_usage only", param="stream_options")
    stop = value.get("stop")
    return Completion(
        model=model_name(value),
        prompts=_texts(value.get("prompt", ""), "prompt", MAX_PROMPTS, empty=True),
        n=_integer(value, "n", 1, 1, MAX_CHOICES),
        max_tokens=_integer(value, "max_tokens", 16, 1, 1 << 20),
        sampling=Sampling(
            temperature=_number(value, "temperature", 1.0, 0.0, 100.0),
            top_p=_number(value, "top_p", 1.0, 1e-6, 1.0),
            seed=_integer(value, "seed", 0, -(1 << 63), (1 << 63) - 1) % (1 << 32),
        ),
        stop=tuple(_texts(stop, "stop", 4, empty=False)) if stop else (),
        stream=_flag(value, "stream"),
        usage=_flag(options, "include_usage"),
    )


def model_name(value: Mapping[str, Any]) -> str:
    """The field `model`.

    Raises:
      Refused: 400.
    """
    if not isinstance(value.get("model"), str):
        raise Refused(400, "model must be the name of a specialist", param="model")
    return value["model"]


def specialist(body: bytes, *, num_domains: int, num_experts: int) -> dict[str, Any]:
    """What `Engine.make` takes, of the body of /v1/specialists.

    Raises:
      Refused: 400, and which field.
    """
    value = parse(body, ("name", "documents", "h", "alpha"))
    name = value.get("name") or ""
    if name and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise Refused(400, "name must be 1 to 64 letters, digits, '.', '_' and '-'", param="name")
    given = [key for key in ("documents", "h", "alpha") if value.get(key) is not None]
    if len(given) != 1:
        raise Refused(400, "exactly one of documents, h and alpha is needed", param="documents")
    if given == ["documents"]:
        texts = _texts(value["documents"], "documents", MAX_DOCUMENTS, empty=False)
        return {"name": name, "texts": texts}
    size = num_domains if given == ["h"] else num_experts
    try:
        numbers = np.array(value[given[0]], np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.zeros(0)
    if numbers.shape != (size,) or not np.isfinite(numbers).all():
        raise Refused(400, f"{given[0]} must be {size} finite numbers", param=given[0])
    if given == ["alpha"]:
        if np.abs(numbers).max(initial=0) > 1e6:
            raise Refused(400, "alpha: coefficients above 1e6 give no model", param="alpha")
        return {"name": name, "alpha_E": numbers.astype(np.float32)}
    if (numbers < 0).any() or not 0 < numbers.sum() < 1e300:
        raise Refused(400, "h must be weights of at least 0, not all of them 0", param="h")
    return {"name": name, "h_K": numbers / numbers.sum()}


def scored(body: bytes) -> tuple[str, list[str]]:
    """(model, documents) of the body of /v1/score.

    Raises:
      Refused: 400, and which field.
    """
    value = parse(body, ("model", "documents"))
    texts = _texts(value.get("documents"), "documents", MAX_DOCUMENTS, empty=False)
    if sum(len(text.encode()) for text in texts) > MAX_SCORED_BYTES:
        most = MAX_SCORED_BYTES >> 10
        raise Refused(400, f"documents: at most {most} KiB are scored at a time", param="documents")
    return model_name(value), texts
