"""The quickstart: a small soup and its generic baseline on text that every Python machine has.

    bash launch/quickstart.sh

runs prepare, train (soup and `:generic`), evaluate, instantiate and generate; the script shows each
command. 4.1M tokens a run; 9 minutes on two idle CPU cores, of which 44 s are the install, and 31
on two busy ones. The learning rates are those of `experiments/minipile.py`; nothing was tuned on
this text. The specialist sets are fixed in `launch/collect_text.py`. It printed (Python 3.11, jax
0.10.2):

                          specialist   generic_h     shared    generic
    asyncio_code             3.6094*    3.7037     3.8063     3.8908
    dataset_cards            4.8804     4.8796*    4.9186     5.0505
    language_reference       4.6660*    4.7040     4.7157     4.9083
    licences                 4.6532*    4.7093     4.7558     4.9339
    numpy_stubs              3.7040*    3.8067     3.8951     3.9163
    optax_code               3.9655*    4.0380     4.0950     4.2391
    package_descriptions     4.7014*    4.7814     4.8052     4.9633
    parquet_headers          3.7974*    4.0020     4.0477     4.1741
    sklearn_cython           4.1311*    4.1912     4.2230     4.3247
    special_functions        4.4081*    4.5194     4.5780     4.6210
    statistics_tests         3.8247*    3.9355     3.9974     4.1018

    average                  4.2128*    4.2973     4.3489     4.4658
    generic validation                  3.8817*    3.9548     4.0219
    (nats per token; lower is better; * best of the line)
    specialists are 0.0845 nats better than generic_h on average, and better on 10 of 11 sets
    specialists are 0.1361 nats better than shared on average, and better on 11 of 11 sets
    specialists are 0.2530 nats better than generic on average, and better on 11 of 11 sets

One run says little about 0.1 nats, and this text, what pip installed that day, is another each
time. On that of three earlier days the averages were 4.3763, 4.4612, 4.4938 and 4.3418 (this
version: the generic model is ahead on 8 of 11 sets), and with an earlier version 4.2822, 4.3889,
4.4089 and 4.4116, and 4.2576, 4.3537, 4.3964 and 4.3145. Over three seeds `experiments/minipile.py`
has the means.

With `--fast` a run has 100 steps, 5 minutes for everything on the same machine: enough to see each
part work, too few to compare methods. Its specialists (6.1592) were better than the same soup at
the generic h (6.1899) and the generic model (6.2250).
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
    cfg.optimizer.learning_rate = 1.6e-2
    cfg.evaluate.every_steps = 250
    cfg.evaluate.max_windows = 32  # during training; the quickstart's last evaluation takes more
    if method.startswith("fast"):
        cfg.num_steps = 100
        cfg.optimizer.warmup_steps = 20
        cfg.evaluate.every_steps = 100
    if method.endswith("generic"):
        base.set_generic(cfg)
        cfg.optimizer.learning_rate = 1.6e-2
    return cfg
