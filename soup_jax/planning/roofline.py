"""How long a training step takes at the least: FLOPs and bytes against a chip's data sheet."""

import math

from ml_collections import ConfigDict

from soup_jax.hardware.chips import Chip
from soup_jax.optim.bank import bank_optimizer
from soup_jax.planning.abstract import AbstractStep, merged_bytes, state_bytes
from soup_jax.soup import bank as experts
from soup_jax.soup import kernels
from soup_jax.training import build


def step_flops(cfg: ConfigDict, step: AbstractStep) -> dict[str, float]:
    """FLOPs of one step over all devices: base network (without recomputation), and the bank.

    The network's are 0 if it does not say them (`BaseModel.flops_per_row`). The bank's: merge,
    gradient of alpha, and update, each 2 M operations for every multiply-add that a kind of experts
    needs to merge one mixture.
    """
    params = step.state.params
    operations = sum(
        experts.kind_of(name).operations(stacks)
        for name, part in params["bank"].items()
        for stacks in experts.by_leaf(part, params["shared"]).values()
    )
    return {
        "base network": step.model.flops_per_row * cfg.batch_size,
        "merge, alpha's gradient and bank update": 6.0 * build.num_groups(cfg) * operations,
    }


def bank_passes(cfg: ConfigDict) -> dict[str, float]:
    """How often a step reads or writes all of the bank, and of each of its moments.

    The bank is read by the merge and by alpha's gradient; the rest its optimizer says.
    """
    optimizer = bank_optimizer(build.optimizer_config(cfg))
    return {"bank": 2 + optimizer.bank_passes, "moments": optimizer.state_passes}


def bank_traffic(cfg: ConfigDict, step: AbstractStep) -> float:
    """Bytes per device that a step must move of state, merged models and their gradients.

    Merged gradients are written once, read for the norms and by alpha's gradient, and by the update
    for every block of experts.
    """
    parts, passes, groups = state_bytes(step), bank_passes(cfg), build.num_groups(cfg)
    state = passes["bank"] * parts["bank"] + passes["moments"] * parts["moments of the bank"]
    state += 3 * parts["shared parameters"] + 2 * parts["moments of shared and router"]
    merged = merged_bytes(cfg, step)
    blocks = math.ceil(cfg.num_experts / kernels.block_size(groups, cfg.num_experts))
    return (
        state + merged["merged models"] + (3 + blocks) * merged["their gradients in float32 slices"]
    )


def roofline(
    cfg: ConfigDict, step: AbstractStep, chip: Chip, moved: float, crossing: float = 0.0
) -> dict[str, float | None]:
    """Seconds per step at the chip's data-sheet rates, tokens per second and MFU.

    Args:
      moved: bytes that a device sends in one step.
      crossing: those of them that go to another slice.

    Returns:
      seconds of "compute" (recomputation of remat included), "bank" (the slower of its memory
      traffic and its FLOPs) and "exchange"; "seconds_at_least", if the three overlap completely,
      and "seconds_in_turn", if they do not; "tokens_per_second" and "mfu", of the latter. All but
      "bank" and "exchange" are None if the network's FLOPs are not known, and all but "compute" and
      "bank" if bytes cross slices at a rate that is not known.
    """
    count, flops = step.mesh.size, step_flops(cfg, step)
    model_flops, bank_flops = flops.values()
    # The bank's sums are float32 whatever it is stored in.
    bank_peak = chip.float32_tflops * 1e12 * count
    bank = max(bank_traffic(cfg, step) / (chip.memory_gbs * 1e9), bank_flops / bank_peak)
    names = ("compute", "seconds_at_least", "seconds_in_turn", "tokens_per_second", "mfu")
    exchange = None
    if not crossing or chip.network_gbs:
        exchange = (moved - crossing) / (chip.exchange_gbs(count) * 1e9)
        exchange += crossing / (chip.network_gbs * 1e9) if crossing else 0.0
    if not model_flops:
        return {**dict.fromkeys(names), "bank": bank, "exchange": exchange}
    peak = chip.peak_tflops * 1e12 * count
    recomputed = {"none": 1.0, "dots": 1.0, "full": 4 / 3}[cfg.model.remat]
    compute = recomputed * model_flops / peak
    if exchange is None:
        return {**dict.fromkeys(names), "compute": compute, "bank": bank, "exchange": None}
    in_turn = compute + bank + exchange
    return {
        "compute": compute,
        "bank": bank,
        "exchange": exchange,
        "seconds_at_least": max(compute, bank, exchange),
        "seconds_in_turn": in_turn,
        "tokens_per_second": cfg.batch_size * cfg.seq_len / in_turn,
        "mfu": model_flops / peak / in_turn,
    }
