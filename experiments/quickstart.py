"""The quickstart: a small soup and its generic baseline on text that every Python machine has.

    bash launch/quickstart.sh

runs prepare, train (soup and `:generic`), evaluate, instantiate and generate; the script shows each
command. 4.1M tokens a run; 5 minutes on two CPU cores, install included. The learning rates are
those of `experiments/minipile.py`; nothing was tuned on this text. The specialist sets are fixed in
`launch/collect_text.py`. It printed (Python 3.11, jax 0.10.2):

                          specialist   generic_h     shared    generic
    asyncio_code             3.6280*    3.6923     3.7863     3.7483
    dataset_cards            4.9739*    5.0120     5.0261     5.0627
    language_reference       4.7194*    4.7593     4.7788     4.7962
    licences                 4.7299*    4.8438     4.8554     4.9013
    numpy_stubs              3.8928*    4.0328     4.0184     4.0072
    optax_code               4.1695*    4.2370     4.2816     4.2863
    package_descriptions     4.5424*    4.6505     4.6705     4.6887
    parquet_headers          4.0291*    4.3177     4.2807     4.2714
    sklearn_cython           4.1757*    4.2329     4.2412     4.2488
    special_functions        4.3876*    4.5177     4.5589     4.5435
    statistics_tests         3.8558*    3.9824     4.0000     3.9734

    average                  4.2822*    4.3889     4.4089     4.4116
    generic validation                  3.9991*    4.0405     4.0236
    (nats per token; lower is better; * best of the line)
    specialists are 0.1067 nats better than generic_h on average, and better on 11 of 11 sets
    specialists are 0.1267 nats better than shared on average, and better on 11 of 11 sets
    specialists are 0.1294 nats better than generic on average, and better on 11 of 11 sets

Here the h of a specialist counted documents; today it counts their tokens. The bank optimizer's
steps had no bound (docs/bank_optimizers.md).

One run says little about 0.05 nats: what pip installed some hours before made 6 of 6,500 documents
differ, so other clusters and other batches; there the averages were 4.2576, 4.3537, 4.3964 and
4.3145, and the specialists better than the generic model on 9 of 11 sets. Over three seeds
`experiments/minipile.py` has the means.

With `--fast` a run has 100 steps, 2 minutes for everything: enough to see each part work, too few
to compare methods. On this text its specialists (6.213) were better than the same soup at the
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
