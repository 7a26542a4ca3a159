"""How parameters lie in a checkpoint, and how the trees of older versions differ from today's.

Version 1 had all experts in one tree, low-rank factors below the path of their leaf, and the state
of the factors' optimizer as an entry "factors" beside the bank optimizer's own.
"""

from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp

from soup_jax import tree
from soup_jax.shapes import Params

CHECKPOINT = 2  # the format that is written


def chunks(path: str, _: Any) -> ocp.SaveArgs:
    """How a leaf of the parameters is cut: experts are read in blocks, so along E first."""
    bank = path.startswith("bank/")
    return ocp.SaveArgs(chunk_byte_size=16 << 20, shard_axes=(0,)) if bank else ocp.SaveArgs()


def to_v1(items: Mapping[str, Any]) -> dict[str, Any]:
    """Items "params" and perhaps "opt_state" of today (arrays, or what describes them), as
    version 1 had them: the target of a restore."""
    old = dict(items)
    params = old["params"]
    bank = {p: x for part in params["bank"].values() for p, x in tree.flatten(part).items()}
    old["params"] = {**params, "bank": tree.unflatten(bank)}
    if "opt_state" in old:
        state = old["opt_state"]["bank"]
        bank_state = dict(state.get("dense", {}))
        if "low_rank" in state:
            bank_state["factors"] = state["low_rank"]
        old["opt_state"] = {**old["opt_state"], "bank": bank_state}
    return old


def from_v1(items: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """What was restored into `to_v1(like)`, as it is today."""
    new = dict(items)
    leaves = tree.flatten(new["params"]["bank"])
    bank: dict[str, Params] = {
        kind: tree.unflatten({path: leaves[path] for path in tree.flatten(part)})
        for kind, part in like["params"]["bank"].items()
    }
    new["params"] = {**new["params"], "bank": bank}
    if "opt_state" in new:
        state = dict(new["opt_state"]["bank"])
        by_kind = {"low_rank": state.pop("factors")} if "factors" in state else {}
        if state:
            by_kind["dense"] = state
        new["opt_state"] = {**new["opt_state"], "bank": by_kind}
    return new
