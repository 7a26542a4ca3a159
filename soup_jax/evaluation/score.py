"""Log-likelihoods of tokens after others, and the losses of whole documents.

A document is read as evaluation harnesses read one: after an end-of-text token, by itself; a longer
one in windows, of which the last reaches back so that its tokens have a full window before them.
Every token of the text is scored once; the end of the text is not scored.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from soup_jax.data.tokenizer import Tokenizer
from soup_jax.errors import UserError
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Array, Params

# Logits that are held at a time, float32; rows are taken together up to it. More would leave the
# caches of a CPU.
_LOGIT_BYTES = 16 << 20
_MAX_ROWS = 32
_SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one document: `nats` is the sum of its tokens' losses."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token; NaN of a text without tokens."""
        return self.nats / self.num_tokens if self.num_tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers; NaN of an empty text."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def numbers(self) -> dict[str, float]:
        """For JSON: "loss", "bits_per_byte", "tokens" and "bytes"."""
        return {
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
        }


def total(scores: Sequence[Score]) -> Score:
    """All documents as if they were one: longer ones weigh more."""
    return Score(
        math.fsum(s.nats for s in scores),
        sum(s.num_tokens for s in scores),
        sum(s.num_bytes for s in scores),
    )


@functools.partial(jax.jit, static_argnames="logits")
def _scores(
    params: Params, tokens_BL: Array, *, logits: Callable[[Params, Array], Array]
) -> tuple[Array, Array]:
    # Of tokens 1.. of each row: log-likelihood, and whether none is likelier. By sums and largest
    # ones, which need no second array of all logits.
    logits_BLV = logits(params, tokens_BL[:, :-1])
    found = jnp.take_along_axis(logits_BLV, tokens_BL[:, 1:, None], axis=-1)[..., 0]
    return found - jax.nn.logsumexp(logits_BLV, axis=-1), found >= logits_BLV.max(axis=-1)


def score_targets(
    model: BaseModel,
    params: Params,
    pairs: Sequence[tuple[Sequence[int], int]],
    *,
    seq_len: int,
) -> Iterator[tuple[int, float, bool]]:
    """(index of a pair, log-likelihood in nats, whether each token is the likeliest), in any order.

    Args:
      pairs: (ids, how many at their end are scored): at least one id before these. Of more than
        `seq_len` + 1 ids the last are read.

    Raises:
      UserError: the network is no language model, or more ids are to be scored than it reads.
    """
    if model.logits is None:
        raise UserError("this network scores no text: its BaseModel has no `logits`")
    vocab_size = jax.eval_shape(model.logits, params, jnp.zeros((1, 1), jnp.int32)).shape[-1]
    lengths: dict[int, list[int]] = {}
    for index, (ids, scored) in enumerate(pairs):
        if not 0 < scored <= min(len(ids) - 1, seq_len):
            raise UserError(
                f"{scored} of {len(ids)} tokens cannot be scored: at least one must stand before "
                f"them, and at most {seq_len} are read at a time"
            )
        length = min(len(ids) - 1, seq_len)
        # Few shapes, so few compilations; what pads a row stands behind it and is not seen.
        padded = min(max(1 << (length - 1).bit_length(), _SHORTEST), seq_len)
        lengths.setdefault(padded, []).append(index)
    for length, indices in lengths.items():
        most = max(min(_LOGIT_BYTES // (4 * length * vocab_size), _MAX_ROWS), 1)
        # A power of two that is no larger than what there is to do.
        rows = min(1 << (most.bit_length() - 1), 1 << (len(indices) - 1).bit_length())
        for start in range(0, len(indices), rows):
            chosen = indices[start : start + rows]
            tokens_BL = np.zeros((rows, length + 1), np.int32)
            for row, index in enumerate(chosen):
                ids = pairs[index][0][-(seq_len + 1) :]
                tokens_BL[row, : len(ids)] = ids
            found, likeliest = _scores(params, tokens_BL, logits=model.logits)
            found, likeliest = np.asarray(found, np.float64), np.asarray(likeliest)
            for row, index in enumerate(chosen):
                ids, scored = pairs[index]
                end = min(len(ids), seq_len + 1) - 1
                part = slice(end - scored, end)
                yield index, float(found[row, part].sum()), bool(likeliest[row, part].all())


def windows(ids: Sequence[int], *, eos_id: int, seq_len: int) -> list[tuple[list[int], int]]:
    """What `score_targets` takes to score every id of a text once."""
    whole = [eos_id, *ids]
    found, done = [], 0
    while done < len(ids):
        scored = min(seq_len, len(ids) - done)
        end = 1 + done + scored
        found.append((whole[max(end - seq_len - 1, 0) : end], scored))
        done += scored
    return found


def score_texts(
    model: BaseModel,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    eos_id: int,
    seq_len: int,
) -> list[Score]:
    """The score of each text.

    Raises:
      UserError: the network is no language model.
    """
    ids = tokenizer.encode_batch(list(texts))
    pairs, owners = [], []
    for index, found in enumerate(ids):
        parts = windows(found, eos_id=eos_id, seq_len=seq_len)
        pairs += parts
        owners += [index] * len(parts)
    nats = np.zeros(len(texts))
    for index, value, _ in score_targets(model, params, pairs, seq_len=seq_len):
        nats[owners[index]] -= value
    return [Score(float(n), len(i), len(t.encode())) for n, i, t in zip(nats, ids, texts)]


def table(texts: Sequence[str], columns: Mapping[str, Sequence[Score]], *, most: int) -> str:
    """Aligned text: a line for each of the first `most` texts, and one for all.

    Args:
      columns: the scores of the texts by one model each, by name.
    """

    def line(what: str, row: Sequence[Score]) -> str:
        numbers = "  ".join(f"{s.loss:>10.4f} {s.bits_per_byte:>8.4f}" for s in row)
        return f"{what[:40]:<40}  {row[0].num_tokens:>8}  {numbers}"

    lines = [f"{'':<40}  {'tokens':>8}  " + "  ".join(f"{name[:19]:>19}" for name in columns)]
    for i, text in enumerate(texts[:most]):
        lines.append(line(" ".join(text.split()), [scores[i] for scores in columns.values()]))
    if len(texts) > most:
        lines.append(f"... {len(texts) - most} more documents")
    lines.append(line(f"all {len(texts)} documents", [total(s) for s in columns.values()]))
    lines.append("(nats per token, and bits per byte; lower is better)")
    return "\n".join(lines)


def as_json(
    columns: Mapping[str, Sequence[Score]], documents: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """{"documents": [...], "total": {...}}; what is known of each document, and its scores."""

    rows = [
        {**known, **{name: scores[i].numbers() for name, scores in columns.items()}}
        for i, known in enumerate(documents)
    ]
    return {
        "documents": rows,
        "total": {name: total(scores).numbers() for name, scores in columns.items()},
    }
