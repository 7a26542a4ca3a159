"""The base network as the rest of the project sees it, and how any Flax module becomes one.

`BaseModel` is all that is asked of a network. `llama` makes one of the shipped decoder;
`from_linen` and `from_nnx` make one of a user's module.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from soup_jax.models.llama import Llama, LlamaConfig, llama_config, llama_flops
from soup_jax.shapes import Array, Params


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A network as pure functions of its parameters.

    Attributes:
      init: key -> parameters, a nested dict of arrays.
      example_losses: (parameters, batch) -> (losses, weights) of any one shape [rows, ...]. The
        batch is a dict of arrays with a leading row dimension. Training minimises
        sum(losses * weights) / sum(weights) over the whole batch.
      flops_per_row: floating-point operations of forward and backward of one row, for MFU; 0 if
        unknown.
      layers: how the paths of the leaves begin that are stacked by layer and used one at a time.
      with_gather: function -> the same network, which applies that function to the parameters of a
        layer where it uses them, for `mesh.gather` = "layer"; None if it cannot.
    """

    init: Callable[[Array], Params]
    example_losses: Callable[[Params, Mapping[str, Array]], tuple[Array, Array]]
    flops_per_row: float = 0.0
    layers: str = ""
    with_gather: "Callable[[Callable[[Params], Params]], BaseModel] | None" = None


def num_target_mask(num_targets_B: Array, seq_len: int) -> Array:
    """float32 [B, L]: 1 where a target is text, 0 where it pads the last window of a domain."""
    return (jnp.arange(seq_len) < num_targets_B[:, None]).astype(jnp.float32)


def llama(
    cfg: LlamaConfig, *, seq_len: int, gather: Callable[[Params], Params] | None = None
) -> BaseModel:
    """The decoder as a BaseModel over batches {"tokens": [rows, L + 1], "num_targets": [rows]}."""
    module = Llama(cfg, gather=gather)

    def init(key: Array) -> Params:
        variables = Llama(cfg).init(key, jnp.zeros((1, 2), jnp.int32))
        return nn.meta.unbox(variables["params"])

    def example_losses(params: Params, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        tokens = batch["tokens"]
        losses = module.apply({"params": params}, tokens[:, :-1], target_BL=tokens[:, 1:])
        return losses, num_target_mask(batch["num_targets"], tokens.shape[1] - 1)

    return BaseModel(
        init,
        example_losses,
        flops_per_row=llama_flops(cfg, seq_len=seq_len),
        layers="layers/",
        with_gather=lambda function: llama(cfg, seq_len=seq_len, gather=function),
    )


def from_config(cfg: ConfigDict) -> BaseModel:
    """The base network of a config."""
    return llama(llama_config(cfg), seq_len=cfg.seq_len)


Loss = Callable[[Any, Mapping[str, Array]], tuple[Array, Array]]


def from_linen(module: nn.Module, *, example: Any, losses: Loss) -> BaseModel:
    """A BaseModel from a Linen module.

    Args:
      module: has only a "params" collection.
      example: input that `module.init(key, example)` takes; only shapes matter.
      losses: (apply, batch) -> (losses, weights), where `apply(x)` runs the module.
    """

    def init(key: Array) -> Params:
        variables = module.init(key, example)
        if set(variables) != {"params"}:
            raise ValueError(
                f"{type(module).__name__} has the collections {sorted(variables)}; a soup merges "
                "parameters only (replace BatchNorm by a norm without running statistics)"
            )
        return nn.meta.unbox(variables["params"])

    def example_losses(params: Params, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        return losses(lambda *args: module.apply({"params": params}, *args), batch)

    return BaseModel(init, example_losses)


def from_nnx(make: Callable[[Any], Any], *, losses: Loss) -> BaseModel:
    """A BaseModel from an NNX module.

    Args:
      make: `nnx.Rngs -> nnx.Module`, called once per `init` and once for the structure.
      losses: (module, batch) -> (losses, weights).
    """
    from flax import nnx

    def abstract() -> tuple[Any, Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)

    def init(key: Array) -> Params:
        _, params, _ = nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)
        # Integer keys (lists of layers) become strings: paths are strings everywhere.
        return _string_keys(nnx.to_pure_dict(params))

    def example_losses(params: Params, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        graph, state, rest = abstract()
        if jax.tree.leaves(rest):
            raise ValueError("a soup merges nnx.Param only; the module holds other variables")
        nnx.replace_by_pure_dict(state, _like(params, nnx.to_pure_dict(state)))
        return losses(nnx.merge(graph, state, rest), batch)

    return BaseModel(init, example_losses)


def _string_keys(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(k): _string_keys(v) for k, v in tree.items()}
    return tree


def _like(tree: Any, template: Any) -> Any:
    if isinstance(template, Mapping):
        return {k: _like(tree[str(k)], v) for k, v in template.items()}
    return tree
