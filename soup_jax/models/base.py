"""The base network as the rest of the project sees it, and how any Flax module becomes one.

`BaseModel` is all that a network must be. A config names one by `model.kind`: a key of KINDS,
or the dotted path of a function of yours, `ModelSettings -> BaseModel`, which `make` calls.
`from_linen` and `from_nnx` make a BaseModel of a module; for a language model that is one line.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from soup_jax.errors import UserError
from soup_jax.registry import Registry
from soup_jax.shapes import Array, Params

Rows = Mapping[str, Array]
Losses = Callable[[Any, Rows], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A network as pure functions of its parameters.

    Attributes:
      init: key -> parameters, a nested dict of arrays.
      example_losses: (parameters, rows) -> (losses, weights) of any one shape [rows, ...]. Rows is
        a dict of arrays with a leading row dimension; of token windows {"tokens": int32 [rows,
        L + 1], "num_targets": int32 [rows]}. Training minimises sum(losses * weights) /
        sum(weights) over the whole batch.
      logits: (parameters, int32 tokens [rows, L]) -> float32 [rows, L, V], each position a function
        of the tokens up to it; None if the network is no language model.
      decode: (parameters, tokens [rows, L], int32 position [rows] of the first of each, cache, *,
        cache_len) -> (logits, cache): the same with a cache of what came before, None at first, for
        `cache_len` positions; its leaves have a leading row dimension, and a longer cache is a
        shorter one with zeros behind it. None if the network has no cache; text is generated
        without, then.
      decode_params: parameters -> those that `decode` takes, made once for some calls of it; None
        if it takes them as they are.
      flops_per_row: floating-point operations of forward and backward of one row, for MFU; 0 if
        unknown.
      layers: how the paths of the leaves begin that are stacked by layer and used one at a time.
      row_products: regex of the leaves, matrices, for which `decode` also takes an object that has
        `astype` and `row_product`, x [rows, L, a] -> [rows, L, b]; "" if for none.
      with_gather: function -> the same network, which applies that function to the parameters of a
        layer where it uses them, for `mesh.gather` = "layer"; None if it cannot.
    """

    init: Callable[[Array], Params]
    example_losses: Callable[[Params, Rows], tuple[Array, Array]]
    logits: Callable[[Params, Array], Array] | None = None
    decode: Callable[..., tuple[Array, Any]] | None = None
    decode_params: Callable[[Params], Any] | None = None
    flops_per_row: float = 0.0
    layers: str = ""
    row_products: str = ""
    with_gather: "Callable[[Callable[[Params], Params]], BaseModel] | None" = None


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """What a network is made from: sizes of the data, and a config's `model` section.

    Each network reads what it needs. `args` has what no other network has: (name, value) pairs.
    """

    vocab_size: int
    seq_len: int
    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    hidden_dim: int
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    dtype: str = "float32"
    remat: str = "none"
    loss_chunk: int = 0
    attention: str = "auto"
    attention_reset: int = -1
    args: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_mapping(
        cls, section: Mapping[str, Any], *, vocab_size: int, seq_len: int
    ) -> "ModelSettings":
        """The settings of a `model` section, of a config or of a recipe, without its `kind`.

        Raises:
          UserError: a field that there is not, or a size that is missing.
        """
        fields = {name: value for name, value in section.items() if name != "kind"}
        fields |= {"vocab_size": vocab_size, "seq_len": seq_len}
        args = fields.get("args", ())
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in args):
            raise UserError(f"model.args must be pairs (name, value), not {args!r}")
        fields["args"] = tuple((name, value) for name, value in args)
        declared = dataclasses.fields(cls)
        unknown = fields.keys() - {f.name for f in declared}
        missing = {f.name for f in declared if f.default is dataclasses.MISSING} - fields.keys()
        if unknown or missing:
            raise UserError(
                f"model: unknown fields {sorted(unknown)}, missing fields {sorted(missing)}"
            )
        return cls(**fields)


KINDS: Registry[Callable[[ModelSettings], BaseModel]] = Registry(
    "base network", {"llama": "soup_jax.models.llama:make"}
)


def make(kind: str, settings: ModelSettings) -> BaseModel:
    """The base network that a config's `model.kind` names.

    Raises:
      UserError: no such network, settings that it refuses, or what was made is no BaseModel.
    """
    function = KINDS.get(kind)
    try:
        model = function(settings)
    except TypeError as e:
        if e.__traceback__ is not None and e.__traceback__.tb_next is not None:
            raise  # from inside of it
        raise UserError(f"model.kind = {kind!r} takes no ModelSettings: {e}") from e
    if not isinstance(model, BaseModel):
        raise UserError(
            f"model.kind = {kind!r} returned a {type(model).__name__}, and must return a BaseModel "
            "(see soup_jax.from_linen and soup_jax.from_nnx)"
        )
    return model


def num_target_mask(num_targets_B: Array, seq_len: int) -> Array:
    """float32 [B, L]: 1 where a target is text, 0 where it pads the last window of a domain."""
    return (jnp.arange(seq_len) < num_targets_B[:, None]).astype(jnp.float32)


def next_token_losses(apply: Callable[[Array], Array], rows: Rows) -> tuple[Array, Array]:
    """Cross-entropies in nats [rows, L] of token windows, and 1 where a target is text.

    Args:
      apply: int32 tokens [rows, L] -> logits [rows, L, V].
      rows: token windows, as BaseModel says.
    """
    tokens = rows["tokens"]
    log_probs = jax.nn.log_softmax(apply(tokens[:, :-1]).astype(jnp.float32))
    losses = -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    return losses, num_target_mask(rows["num_targets"], tokens.shape[1] - 1)


def from_linen(
    module: nn.Module, *, example: Any = None, losses: Losses = next_token_losses
) -> BaseModel:
    """A BaseModel from a Linen module.

    Args:
      module: has only a "params" collection. By default a causal language model, int32 tokens
        [rows, L] -> logits [rows, L, V], for any L up to the config's `seq_len`.
      example: input that `module.init(key, example)` takes; only shapes matter. Default: tokens.
      losses: (apply, rows) -> (losses, weights), where `apply(x)` runs the module.

    Raises:
      UserError: when parameters are made, if the module has other collections.
    """
    if example is None:
        example = jnp.zeros((1, 1), jnp.int32)

    def init(key: Array) -> Params:
        variables = module.init(key, example)
        if set(variables) != {"params"}:
            raise UserError(
                f"{type(module).__name__} has the collections {sorted(variables)}; a soup merges "
                "parameters only (replace BatchNorm by a norm without running statistics)"
            )
        return nn.meta.unbox(variables["params"])

    def bound(params: Params) -> Callable[..., Any]:
        return lambda *args: module.apply({"params": params}, *args)

    return _from_bound(init, bound, losses)


def from_nnx(make: Callable[[Any], Any], *, losses: Losses = next_token_losses) -> BaseModel:
    """A BaseModel from an NNX module.

    Args:
      make: `nnx.Rngs -> nnx.Module`, called once per `init` and once for the structure. By default
        a causal language model, int32 tokens [rows, L] -> logits [rows, L, V], for any L up to the
        config's `seq_len`.
      losses: (module, rows) -> (losses, weights).

    Raises:
      UserError: when the module is used, if it holds other variables than `nnx.Param`.
    """
    from flax import nnx

    def init(key: Array) -> Params:
        _, params, _ = nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)  # type: ignore[misc]
        # Integer keys (lists of layers) become strings: paths are strings everywhere.
        return _string_keys(nnx.to_pure_dict(params))

    def bound(params: Params) -> Any:
        module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        graph, state, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
        if jax.tree.leaves(rest):
            raise UserError(
                f"{type(module).__name__} holds other variables than nnx.Param; a soup merges "
                "parameters only (no dropout, no running statistics)"
            )
        nnx.replace_by_pure_dict(state, _like(params, nnx.to_pure_dict(state)))
        return nnx.merge(graph, state, rest)

    return _from_bound(init, bound, losses)


def _from_bound(
    init: Callable[[Array], Params], bound: Callable[[Params], Any], losses: Losses
) -> BaseModel:
    def example_losses(params: Params, rows: Rows) -> tuple[Array, Array]:
        return losses(bound(params), rows)

    def logits(params: Params, token_BL: Array) -> Array:
        return bound(params)(token_BL).astype(jnp.float32)

    # Only of these losses is it known that what the module returns are logits.
    return BaseModel(init, example_losses, logits if losses is next_token_losses else None)


def _string_keys(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(k): _string_keys(v) for k, v in tree.items()}
    return tree


def _like(tree: Any, template: Any) -> Any:
    if isinstance(template, Mapping):
        return {k: _like(tree[str(k)], v) for k, v in template.items()}
    return tree
