"""A 110M base network with 128 dense experts over 4,096 domains: the paper's headline size.

For a slice of 16 TPU v5e chips or more, or GPUs with the same memory in total:

    soup-jax prepare --config=experiments/soup_110m.py --config.corpus.sources='DATA/*.jsonl.zst'
    soup-jax train   --config=experiments/soup_110m.py --workdir=runs/soup_110m

What it needs, by `soup-jax plan --config=experiments/soup_110m.py --topology=v5e:4x4` (jax 0.10.2
and its libtpu): 10.8 of 16 GB a chip, and nothing moves between chips but merged models and small
sums. What a chip sends in a step hardly depends on the experts (`--config.num_experts=8`, `=32`):

    experts   sent, MB   of that norms, router, alpha
          8    410.832     0.095
         32    410.835     0.098
        128    410.846     0.109

The state alone on a single GPU, exact, by `soup-jax plan --num_devices=1`, `--chip` and the flags
below, with `--config.experts.dtype=bfloat16` in all (GB). Merged models, their gradients and
activations come on top; only the chip's compiler can tell how much these are:

    network  bank    --chip        state  further flags
    110M     merged  H100 (80)      29.8  none
    110M     adamw   H200 (141)     85.4  --config.optimizer.moment_dtype=bfloat16
    335M     merged  H200 (141)     91.5  the sizes of base.py's preset 335m, one by one

`--config.optimizer.grad_accumulation`, `--config.model.remat=full` and fewer mixtures make what
comes on top smaller.

`experiments/generic_110m.py` is its baseline: same network, same tokens, no experts. Neither has
been trained by us: the sizes are the paper's, the optimizer settings are those that the small runs
of `experiments/minipile.py` chose, with the learning rate scaled down for the width; the rate is of
before the network's present init (docs/measured.md), with which small networks take twice as much.
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
