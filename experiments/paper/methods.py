"""The soup and what it is compared with, at four sizes: `--config=FILE.py:METHOD,SIZE`.

The studies in benchmarks/paper/ train these.

    soup-jax train --config=experiments/paper/methods.py:soup,small --workdir=runs/soup

METHOD is one of METHODS:

    soup        Soup-of-Experts
    per_window  a soup whose every row has the h of its own window, one domain: merging per
                sequence, as SMEAR and Lory do
    generic     one model, on the natural frequencies
    fixed       one model, on the one h in the file --config.domain_weights.path: CRISP where that
                is the histogram of a specialist, a domain expert where it is one domain
    large       one model, on the natural frequencies, with about as many parameters as the soup
                stores (small only)

and SIZE one of SIZES. `small` is for two CPU cores. The others are for accelerators; nobody has
trained them. They have 20 tokens for each parameter of the base network, and the hours are a
calculation, not a measurement: 6 FLOPs for each parameter and token, by one H100 at 40% of its 989
TFLOP/s. What experts add is said by `soup-jax plan`.

    size     base network   tokens   hours
    small          0.24M     5.0M
    35m            23.2M     464M     0.05
    110m          110.1M     2.20B    1.0
    335m          337.2M     6.74B    9.6
"""

from typing import Any

from ml_collections import ConfigDict

from soup_jax.experiments import base, minipile

METHODS = ("soup", "per_window", "generic", "fixed", "large")
SIZES = ("small", "35m", "110m", "335m")

# Of `small`; soup and generic were tuned (docs/results.md), the others are guessed from them.
RATES = {"soup": 1.6e-2, "per_window": 1.6e-2, "generic": 1.6e-2, "fixed": 1.6e-2, "large": 4e-3}
# Batch, steps and rate of a dense model of the others: not tuned, and from before the present init.
_POD = {"35m": (64, 7080, 3e-3), "110m": (128, 16_800, 2e-3), "335m": (256, 25_700, 1e-3)}


def get_config(arg: str = "soup,small") -> ConfigDict:
    """The full config; `arg` is METHOD or METHOD,SIZE."""
    method, _, size = arg.partition(",")
    size = size or "small"
    if method not in METHODS or size not in SIZES:
        raise ValueError(f"{arg!r} is not METHOD,SIZE with one of {METHODS} and one of {SIZES}")
    cfg = _small() if size == "small" else _pod(size)
    cfg.name = f"{method}_{size}"
    if size == "small":
        cfg.optimizer.learning_rate = RATES[method]
    if method == "per_window":
        cfg.num_mixtures = cfg.batch_size
        cfg.domain_weights.update({"sparse": 1.0, "generic": 0.0, "support_size": 1})
    elif method != "soup":
        base.set_generic(cfg)
    if method == "fixed":
        cfg.domain_weights.update({"generic": 0.0, "file": 1.0})
    if method == "large":
        if size != "small":
            raise ValueError(f"large is only there for small, not for {size}")
        _set_network(cfg, num_layers=4, dim=256, hidden_dim=768, num_heads=4)
    return cfg


def _small() -> ConfigDict:
    cfg = minipile.get_config()
    cfg.corpus.dir = "corpora/paper"
    return cfg


def _pod(size: str) -> ConfigDict:
    cfg = base.get_config(size)
    cfg.num_domains = 4096
    cfg.num_experts = 64
    cfg.num_mixtures = 16
    cfg.vocab_size = 32_768
    cfg.seq_len = 1024
    cfg.batch_size, cfg.num_steps, cfg.optimizer.learning_rate = _POD[size]
    cfg.corpus.dir = "corpora/paper_pod"
    cfg.corpus.levels = (64,)
    cfg.embed.kind = "minilm"
    cfg.embed.fit_documents = 400_000
    cfg.model.dtype = "bfloat16"
    cfg.model.loss_chunk = 128
    cfg.domain_weights.support_size = 64
    cfg.optimizer.warmup_steps = 500
    cfg.checkpoint.every_steps = 1000
    return cfg


def _set_network(cfg: ConfigDict, **sizes: Any) -> None:
    cfg.model.update(sizes)
    cfg.model.num_kv_heads = cfg.model.num_heads
