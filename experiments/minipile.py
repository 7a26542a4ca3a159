"""A soup and its generic baseline on 16 specialist domains, sized for two CPU cores.

(docstring with commands and table: written after the runs)
"""

from ml_collections import ConfigDict

from soup_jax.experiments import base


def get_config(method: str = "soup") -> ConfigDict:
    """`method` is "soup" or "generic" (the same base network and tokens, zero experts)."""
    cfg = base.get_config()
    cfg.name = f"minipile_{method}"
    cfg.num_domains = 64
    cfg.num_experts = 16
    cfg.num_mixtures = 16
    cfg.vocab_size = 2048
    cfg.seq_len = 256
    cfg.batch_size = 16
    cfg.num_steps = 1220  # 5.0M tokens
    cfg.corpus.dir = "corpora/minipile"
    cfg.model.update({"num_layers": 2, "dim": 64, "hidden_dim": 192, "num_heads": 2})
    cfg.model.num_kv_heads = 2
    cfg.optimizer.learning_rate = 1.2e-2
    cfg.checkpoint.every_steps = 500
    if method == "generic":
        base.set_generic(cfg)
    elif method != "soup":
        raise ValueError(f"unknown method {method!r}: soup or generic")
    return cfg
