"""The quickstart: a small soup and its generic baseline on text that every Python machine has.

    bash launch/quickstart.sh

runs prepare, train (soup and `:generic`), evaluate, instantiate and generate; the script shows each
command. 4.1M tokens a run; on two CPU cores, install apart, 7.5 minutes when they had little else
to do, 14 beside other runs. The learning rates are those of `experiments/minipile.py`; nothing was
tuned on this text. The specialist sets are fixed in `launch/collect_text.py`. It printed (Python
3.11, jax 0.10.2):

                          specialist   generic_h     shared    generic
    asyncio_code             3.6742     3.7447     3.8240     3.6488*
    dataset_cards            4.9674*    4.9911     5.0263     4.9788
    language_reference       4.7042*    4.7377     4.7736     4.7106
    licences                 4.7852     4.9070     4.8863     4.7620*
    numpy_stubs              3.8227*    3.9023     4.0115     3.9372
    optax_code               4.1011*    4.1842     4.2493     4.1621
    package_descriptions     4.4727*    4.5764     4.6477     4.5649
    parquet_headers          3.9789*    4.2359     4.2219     4.1503
    sklearn_cython           4.1484*    4.1842     4.1967     4.1633
    special_functions        4.3374*    4.4506     4.5122     4.4557
    statistics_tests         3.8409*    3.9762     4.0111     3.9262

    average                  4.2576*    4.3537     4.3964     4.3145
    generic validation                  3.9706     4.0111     3.9242*
    (nats per token; lower is better; * best of the line)
    specialists are 0.0961 nats better than generic_h on average, and better on 11 of 11 sets
    specialists are 0.1388 nats better than shared on average, and better on 11 of 11 sets
    specialists are 0.0570 nats better than generic on average, and better on 9 of 11 sets

With `--fast` a run has 100 steps, 2 minutes for everything: enough to see each part work, too few
to compare methods. Its specialists were better than the same soup at the generic h (6.186 against
6.232) and worse than the generic model (6.158), whose learning rate is higher.
"""

from ml_collections import ConfigDict

from soup_jax.experiments import base


def get_config(method: str = "soup") -> ConfigDict:
    """`method` is soup or generic; with "fast" before it ("fast", "fast_generic") a short look."""
    if method not in ("soup", "generic", "fast", "fast_generic"):
        raise ValueError(f"unknown method {method!r}: soup, generic, fast or fast_generic")
    cfg = base.get_config()
    cfg.name = f"quickstart_{method}"
    cfg.num_domains = 48
    cfg.num_experts = 16
    cfg.num_mixtures = 16
    cfg.vocab_size = 2048
    cfg.seq_len = 256
    cfg.batch_size = 16
    cfg.num_steps = 1000
    cfg.corpus.dir = "runs/quickstart/corpus"
    cfg.model.update({"num_layers": 2, "dim": 64, "hidden_dim": 192, "num_heads": 2})
    cfg.model.num_kv_heads = 2
    cfg.optimizer.learning_rate = 5.5e-3
    cfg.evaluate.every_steps = 250
    cfg.evaluate.max_windows = 32  # during training; the quickstart's last evaluation takes more
    if method.startswith("fast"):
        cfg.num_steps = 100
        cfg.optimizer.warmup_steps = 20
        cfg.evaluate.every_steps = 100
    if method.endswith("generic"):
        base.set_generic(cfg)
        cfg.optimizer.learning_rate = 8e-3
    return cfg
