"""A 110M base network with 128 dense experts over 4,096 domains: the paper's headline size.

For a slice of 16 TPU v5e chips or more, or GPUs with the same memory in total:

    soup-jax prepare --config=experiments/soup_110m.py --config.corpus.sources='DATA/*.jsonl.zst'
    soup-jax train   --config=experiments/soup_110m.py --workdir=runs/soup_110m

`experiments/generic_110m.py` is its baseline: same network, same tokens, no experts. Neither has
been trained by us: the sizes are the paper's, the optimizer settings are those that the small runs
of `experiments/minipile.py` chose, with the learning rate scaled down for the width.
"""

from ml_collections import ConfigDict

from soup_jax.experiments import base


def get_config() -> ConfigDict:
    """The full config."""
    cfg = base.get_config("110m")
    cfg.name = "soup_110m"
    cfg.num_domains = 4096
    cfg.num_experts = 128
    cfg.num_mixtures = 16
    cfg.vocab_size = 32_000
    cfg.seq_len = 1024
    cfg.batch_size = 256
    cfg.num_steps = 100_000  # 26 billion tokens
    cfg.corpus.dir = "corpora/soup_110m"
    cfg.corpus.validation_fraction = 0.001
    cfg.embed.fit_documents = 400_000
    cfg.model.dtype = "bfloat16"
    cfg.model.loss_chunk = 128
    cfg.model.remat = "dots"
    cfg.domain_weights.support_size = 64
    cfg.optimizer.learning_rate = 1e-3
    cfg.optimizer.warmup_steps = 2000
    cfg.checkpoint.every_steps = 2000
    cfg.log.every_steps = 50
    cfg.loader.num_threads = 16
    cfg.loader.prefetch = 16
    return cfg
