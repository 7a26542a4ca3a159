"""The quickstart: a small soup and its generic baseline on text that every Python machine has.

    bash launch/quickstart.sh

runs prepare, train (soup and `:generic`), evaluate, instantiate and generate; the script shows each
command. 4.1M tokens a run; 21 minutes on one busy core, of which 114 s are the install. The
learning rates are those of `experiments/minipile.py`; nothing was tuned on this text. The
specialist sets are fixed in `launch/collect_text.py`. It printed (Python 3.11, jax 0.10.2):

                          specialist   generic_h     shared    generic
    asyncio_code             3.5407*    3.6500     3.6595     3.6489
    dataset_cards            4.7552*    4.8012     4.8123     4.7935
    language_reference       4.5876*    4.5955     4.5967     4.5894
    licences                 4.6405*    4.7420     4.7472     4.7131
    numpy_stubs              3.6610*    3.7229     3.7368     3.7220
    optax_code               3.8956*    3.9902     3.9872     3.9858
    package_descriptions     4.6065*    4.6950     4.7059     4.7292
    parquet_headers          3.7807*    3.9801     3.9727     3.8904
    sklearn_cython           4.0804*    4.1378     4.1416     4.1055
    special_functions        4.3574*    4.4695     4.4792     4.4925
    statistics_tests         3.7277*    3.8858     3.8850     3.8658

    average                  4.1485*    4.2427     4.2477     4.2306
    generic validation                  3.8799     3.8825     3.8559*
    (nats per token; lower is better; * best of the line)
    specialists are 0.0942 nats better than generic_h on average, and better on 11 of 11 sets
    specialists are 0.0992 nats better than shared on average, and better on 11 of 11 sets
    specialists are 0.0821 nats better than generic on average, and better on 11 of 11 sets

One run says little about 0.05 nats, and this text, what pip installed that day, is another each
time. Runs with the network's earlier init (docs/measured.md), on the text of four other days, had
specialists of 4.2128, 4.3763, 4.2822 and 4.2576, and generic models of 4.4658, 4.3418, 4.4116 and
4.3145.

With `--fast` a run has 100 steps, 8 minutes for all but the install on the same machine when
busier: enough to see each part work, too few to compare methods. Its specialists (5.2560) were
better than the same soup at the generic h (5.3146) and the generic model (5.3486).
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
    return cfg
