"""The quickstart: a small soup and its generic baseline on text that every Python machine has.

    bash launch/quickstart.sh

runs prepare, train (soup and `:generic`), evaluate, instantiate and generate; the script shows each
command. 4.1M tokens a run; 5 minutes on two idle CPU cores, install included, and 31 on two busy
ones. The learning rates are those of `experiments/minipile.py`; nothing was tuned on this text. The
specialist sets are fixed in `launch/collect_text.py`. It printed (Python 3.11, jax 0.10.2):

                          specialist   generic_h     shared    generic
    asyncio_code             3.8184     3.8663     3.8874     3.7559*
    dataset_cards            4.9699     4.9988     5.0626     4.9139*
    language_reference       4.8359     4.8546     4.8685     4.7538*
    licences                 4.8554     4.9470     4.9696     4.8023*
    numpy_stubs              3.8245     3.8995     4.0159     3.7818*
    optax_code               4.1601     4.2155     4.3012     4.1305*
    package_descriptions     4.9200     4.9662     5.0259     4.8211*
    parquet_headers          4.0081*    4.2702     4.2161     4.0509
    sklearn_cython           4.2613     4.3463     4.2972     4.2377*
    special_functions        4.5210*    4.6130     4.6791     4.5347
    statistics_tests         3.9641*    4.0960     4.1082     3.9766

    average                  4.3763     4.4612     4.4938     4.3418*
    generic validation                  4.0723     4.0959     3.9600*
    (nats per token; lower is better; * best of the line)
    specialists are 0.0850 nats better than generic_h on average, and better on 11 of 11 sets
    specialists are 0.1175 nats better than shared on average, and better on 11 of 11 sets
    specialists are 0.0345 nats WORSE than generic on average, and better on 3 of 11 sets

One run says little about 0.05 nats, and this text, what pip installed that day, is another each
time. On that of two earlier days, with an earlier version, the averages were 4.2822, 4.3889, 4.4089
and 4.4116, the specialists better than the generic model on all 11 sets, and 4.2576, 4.3537, 4.3964
and 4.3145, better on 9. Over three seeds `experiments/minipile.py` has the means.

With `--fast` a run has 100 steps, 2 minutes for everything: enough to see each part work, too few
to compare methods. On an earlier text its specialists (6.213) were better than the same soup at the
generic h (6.258) and the generic model (6.281); on that other text worse than the latter.
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
