"""Train a specialist on, on its own documents, until those that were held back get no better.

One of five documents is held back, by a hash of its text. All parameters are trained, or low-rank
additions to the matrices (LoRA), which are merged in the end: the result is a specialist like any
other. Step 0 is a candidate too, so it is never worse on the documents that were held back.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from soup_jax import tree
from soup_jax.data.readers import text_hash
from soup_jax.errors import UserError
from soup_jax.evaluation.sets import TokenSet, pack, part_fraction
from soup_jax.models.base import Rows
from soup_jax.shapes import Array, Params
from soup_jax.specialists.search import mean_loss
from soup_jax.specialists.specialist import Specialist

_log = logging.getLogger(__name__)

HELD_FRACTION = 0.2
EVERY = 10  # steps between two looks at the held-back documents
PATIENCE = 5  # looks without a new minimum before it ends
_ROWS = 16  # windows of a step


def finetune(
    specialist: Specialist,
    texts: Sequence[str],
    *,
    learning_rate: float = 1e-3,
    max_steps: int = 1000,
    rank: int = 0,
    seed: int = 0,
    say: Callable[[str], None] = _log.info,
) -> Specialist:
    """The specialist at the step at which the held-back documents are predicted best.

    Args:
      texts: at least one must be held back, and one left.
      learning_rate: of AdamW, constant.
      rank: of LoRA; 0 trains all parameters.
      seed: of the order of windows, and of the low-rank factors.

    Returns:
      A specialist whose recipe has "finetuned": steps, losses before and after, and settings.

    Raises:
      UserError: too few documents, settings that mean nothing, or a loss that is not finite.
    """
    for good, what in (
        (0 < learning_rate < 1, f"learning_rate = {learning_rate} must be between 0 and 1"),
        (max_steps > 0, f"max_steps = {max_steps} must be above 0"),
        (rank >= 0, f"rank = {rank} must be at least 0"),
    ):
        if not good:
            raise UserError(what)
    fitted, held = _split(specialist, texts)
    settings: dict[str, Any] = {"learning_rate": learning_rate, "rank": rank, "seed": seed}
    params, steps, losses = _train(specialist, fitted, held, max_steps, say, **settings)
    digest = hashlib.sha256("\0".join(sorted(texts)).encode()).hexdigest()
    described = {"steps": steps, "start_loss": losses[0], "loss": min(losses), "documents": digest}
    return dataclasses.replace(
        specialist,
        params=params,
        recipe={**specialist.recipe, "finetuned": described | settings},
    )


def _train(
    specialist: Specialist,
    fitted: TokenSet,
    held: TokenSet,
    max_steps: int,
    say: Callable[[str], None],
    *,
    learning_rate: float,
    rank: int,
    seed: int,
) -> tuple[Params, int, list[float]]:
    # Parameters of the best step, that step, and the losses of the held-back documents.
    start = jax.tree.map(jnp.asarray, specialist.params)
    trained = _factors(start, rank, seed, specialist.model.layers) if rank else start
    optimizer = optax.adamw(learning_rate, b2=0.95, weight_decay=0.0)
    state = optimizer.init(trained)
    best, best_step = trained, 0
    losses = [mean_loss(specialist.model, specialist.params, held)]
    rng = np.random.default_rng(seed)
    order: list[int] = []
    for step in range(1, max_steps + 1):
        while len(order) < _ROWS:
            order += rng.permutation(len(fitted.tokens)).tolist()
        chosen, order = order[:_ROWS], order[_ROWS:]
        rows = {"tokens": fitted.tokens[chosen], "num_targets": fitted.num_targets[chosen]}
        trained, state = _step(
            start,
            trained,
            state,
            rows,
            optimizer=optimizer,
            example_losses=specialist.model.example_losses,
            rank=rank,
        )
        if step % EVERY == 0 or step == max_steps:
            losses.append(mean_loss(specialist.model, _merged(start, trained, rank), held))
            if not np.isfinite(losses[-1]):
                raise UserError(
                    f"the loss is not finite after {step} steps: take a lower learning_rate than "
                    f"{learning_rate}"
                )
            say(f"step {step}: {losses[-1]:.4f} nats per token of the documents held back")
            if losses[-1] == min(losses) and losses[-1] < losses[0]:
                best, best_step = trained, step
            if len(losses) - 1 - int(np.argmin(losses)) >= PATIENCE:
                break
    params = jax.device_get(_merged(start, best, rank)) if best_step else specialist.params
    return params, best_step, losses


def held_back(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """(documents that are fitted, documents held back): one of five, by a hash of its text, and at
    least one on each side; of a single document, or none, one side is empty."""
    held = {t for t in texts if part_fraction(text_hash(t)) >= 1 - HELD_FRACTION}
    fitted, back = ([t for t in texts if (t in held) == wanted] for wanted in (False, True))
    if not fitted or not back:  # few documents, all on one side: hold back the last
        return list(texts[:-1]), list(texts[-1:])
    return fitted, back


def _split(specialist: Specialist, texts: Sequence[str]) -> tuple[TokenSet, TokenSet]:
    parts = held_back(texts)
    if not all(parts):
        raise UserError(
            "fine-tuning needs at least two documents: it ends when one that is held back gets no "
            "better"
        )
    recipe = specialist.recipe
    settings = {"eos_id": recipe["eos_id"], "seq_len": recipe["seq_len"], "max_windows": 0}
    fitted, back = (pack(specialist.tokenizer, part, **settings) for part in parts)
    return fitted, back


def _factors(params: Params, rank: int, seed: int, layers: str) -> Params:
    # Left factors are zero, so step 0 is the model as it is; stacked layers have one each.
    found = {}
    for i, (path, leaf) in enumerate(tree.flatten(params).items()):
        stacked = bool(layers) and path.startswith(layers)
        if leaf.ndim - stacked >= 2 and not path.startswith("embedding"):
            *stack, rows, columns = leaf.shape
            key = jax.random.fold_in(jax.random.key(seed), i)
            right = jax.random.normal(key, (*stack, rank, columns)) * columns**-0.5
            found[path] = {"left": jnp.zeros((*stack, rows, rank)), "right": right}
    return found


def _merged(start: Params, trained: Params, rank: int) -> Params:
    if not rank:
        return trained

    def leaf(path: str, x: Array) -> Array:
        factors = trained.get(path)
        return x + factors["left"] @ factors["right"] if factors else x

    return tree.map_named(leaf, start)


@functools.partial(jax.jit, static_argnames=("optimizer", "example_losses", "rank"))
def _step(
    start: Params,
    trained: Params,
    state: Any,
    rows: Rows,
    *,
    optimizer: Any,
    example_losses: Callable[[Params, Rows], tuple[Array, Array]],
    rank: int,
) -> tuple[Params, Any]:
    def loss(trained: Params) -> Array:
        found, weights = example_losses(_merged(start, trained, rank), rows)
        return (found * weights).sum() / jnp.maximum(weights.sum(), 1)

    updates, state = optimizer.update(jax.grad(loss)(trained), state, trained)
    return optax.apply_updates(trained, updates), state
