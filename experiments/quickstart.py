"""The quickstart: a small soup and its generic baseline on text that every Python machine has.

    bash launch/quickstart.sh

runs prepare, train (soup and `:generic`), evaluate, instantiate and generate; the script shows each
command. 4.1M tokens a run; on two CPU cores, install apart, 7.5 minutes (collecting text 37 s,
prepare 72 s, soup 182 s, generic 117 s, evaluation 27 s). The learning rate is the generic model's
best of three in `experiments/minipile.py` (the soup prefers a lower one there); it was not tuned on
this text. The specialist sets are fixed in `launch/collect_text.py`. It printed (Python 3.11, jax
0.10.2):

                          specialist   generic_h     shared    generic
    asyncio_code             3.6953*    3.7806     3.7976     3.7325
    dataset_cards            4.9578*    4.9804     4.9961     4.9758
    language_reference       4.6876*    4.7226     4.7308     4.6900
    licences                 4.7160*    4.8317     4.8438     4.7729
    numpy_stubs              3.7523*    3.8777     3.8988     3.8991
    optax_code               4.0611*    4.1337     4.1556     4.1332
    package_descriptions     4.5326*    4.6299     4.6520     4.6218
    parquet_headers          4.0073*    4.2601     4.2413     4.2033
    sklearn_cython           4.2525     4.2774     4.2639     4.2344*
    special_functions        4.2974*    4.4437     4.4553     4.4021
    statistics_tests         3.8220*    3.9831     3.9723     3.9410

    average                  4.2529*    4.3565     4.3643     4.3278
    generic validation                  3.9669     3.9621     3.9188*
    (nats per token; lower is better; * best of the line)
    specialists are 0.1036 nats better than generic_h on average, and better on 11 of 11 sets
    specialists are 0.1114 nats better than shared on average, and better on 11 of 11 sets
    specialists are 0.0750 nats better than generic on average, and better on 10 of 11 sets
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
