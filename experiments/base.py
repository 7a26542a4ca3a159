"""Every field a soup_jax config can have, with its neutral default and its meaning.

A config file is a program whose `get_config()` returns this dictionary with some values changed;
no field exists that is not listed here, and `soup_jax.config.schema` refuses one that does. The
optional argument names a model preset: `--config=experiments/base.py:110m`.

Any field is set from the command line as `--config.section.field=value`; a tuple of strings takes
`--config.corpus.sources=a,b` as one string each in Python notation: `"('a','b')"`.
"""

from ml_collections import ConfigDict

# The paper's model sizes, with the usual Llama proportions. Parameter counts (without experts)
# are printed by `soup-jax train` and held by tests/model_test.py.
MODEL_PRESETS = {
    "tiny": {"num_layers": 2, "dim": 64, "num_heads": 4, "hidden_dim": 192},
    "35m": {"num_layers": 6, "dim": 384, "num_heads": 6, "hidden_dim": 1024},
    "110m": {"num_layers": 12, "dim": 768, "num_heads": 12, "hidden_dim": 2048},
    "335m": {"num_layers": 24, "dim": 1024, "num_heads": 16, "hidden_dim": 2752},
}


def set_model(cfg: ConfigDict, preset: str) -> None:
    """Set the dimensions of one of MODEL_PRESETS; key and value heads equal the query heads."""
    if preset not in MODEL_PRESETS:
        raise ValueError(f"unknown model preset {preset!r}; the presets are {list(MODEL_PRESETS)}")
    cfg.model.update(MODEL_PRESETS[preset])
    cfg.model.num_kv_heads = cfg.model.num_heads


def set_generic(cfg: ConfigDict) -> None:
    """Make a soup's config that of its generic baseline: no experts, natural frequencies only."""
    cfg.num_experts = 0
    cfg.num_mixtures = 1
    cfg.domain_weights.update({"sparse": 0.0, "generic": 1.0, "dirichlet": 0.0, "file": 0.0})


def get_config(preset: str = "tiny") -> ConfigDict:
    """The full config with every default; `preset` is one of MODEL_PRESETS."""
    cfg = ConfigDict()
    cfg.name = "base"  # of the run, in logs and recipes
    cfg.seed = 0  # of the model's init and of the sampling plan; the corpus has none
    cfg.num_domains = 16  # K, clusters the corpus is cut into
    cfg.num_experts = 8  # E; 0 is the generic model through the same code
    cfg.num_mixtures = 1  # M, domain-weight vectors per step; divides batch_size
    cfg.vocab_size = 4096  # V, of the tokenizer that `prepare` trains, and of the model
    cfg.seq_len = 256  # L, tokens per window
    cfg.batch_size = 64  # B, windows per step over all devices
    cfg.num_steps = 1000  # optimizer updates; tokens = num_steps * batch_size * seq_len

    cfg.corpus = corpus = ConfigDict()
    corpus.dir = "corpus"  # the prepared corpus: written by `prepare`, read by the rest
    corpus.sources = ()  # files, folders or globs: .txt .md .py ..., .jsonl[.gz|.zst], .parquet
    corpus.text_field = "text"  # of a JSON line or Parquet row
    corpus.validation_fraction = 0.02  # of the documents, by hash
    corpus.held_out_fraction = 0.0  # likewise; nothing here reads it: for the final word
    corpus.min_chars = 1  # shorter documents are dropped, counted and reported
    corpus.max_chars = 1_000_000  # longer documents are cut into pieces of this size
    corpus.num_workers = 0  # processes that tokenise and embed; 0: one per CPU core

    cfg.tokenizer = tokenizer = ConfigDict()
    tokenizer.path = ""  # a tokenizer.json to take; empty: train a byte-level BPE
    tokenizer.train_bytes = 50_000_000  # about how much text the BPE is trained on

    cfg.embed = embed = ConfigDict()
    embed.kind = "tfidf_svd"  # the document embedder; see soup_jax/data/embed.py
    embed.dim = 128  # of the embedding after the SVD
    embed.max_features = 30_000  # words and word pairs kept by TF-IDF
    embed.fit_documents = 50_000  # documents TF-IDF, SVD and k-means are fitted on, at most
    embed.max_chars = 20_000  # of a document that are looked at

    cfg.domain_weights = weights = ConfigDict()
    # The meta-distribution pi over h: four components; their probabilities add up to 1. Shares,
    # sizes and exponent were chosen on the runs of experiments/minipile.py; its docstring has the
    # measurements, those of the router and of the bank's learning rate below too.
    weights.sparse = 0.8  # h with support_size domains, uniform weights, normalised
    weights.generic = 0.2  # the natural domain frequencies
    weights.dirichlet = 0.0  # Dirichlet(concentration * natural frequencies)
    weights.file = 0.0  # a row of `path`, drawn uniformly; one row: a fixed h (CRISP)
    weights.support_size = 16  # s of the sparse component, largest value
    weights.min_support_size = 1  # and smallest; between them log-uniformly drawn
    weights.support_exponent = 1.0  # draw these domains by frequency ** this; 0: uniformly
    weights.concentration = 8.0  # of the Dirichlet component
    weights.path = ""  # .json: a list of K numbers, a list of such lists, or a recipe.json

    cfg.loader = loader = ConfigDict()
    loader.num_threads = 2  # grain threads that read batches
    loader.prefetch = 8  # batches read ahead, per process

    cfg.model = model = ConfigDict()
    model.kind = "llama"  # the shipped decoder; other Flax modules: see README, "Your own model"
    model.num_layers = 2  # N
    model.dim = 64  # D
    model.num_heads = 4  # H
    model.num_kv_heads = 4  # divides num_heads: grouped-query attention
    model.hidden_dim = 192  # F, of the SwiGLU MLP
    model.tie_embeddings = True  # the output projection is the embedding's transpose
    model.rope_theta = 10_000.0  # base of the rotary position embedding
    model.norm_eps = 1e-5  # of RMSNorm
    model.dtype = "float32"  # of activations and of the merged weights: float32 or bfloat16
    model.remat = "none"  # recompute in the backward pass: none, full, or dots (keep matmuls)
    model.loss_chunk = 0  # positions whose logits exist at once; divides seq_len. 0: all
    model.attention = "auto"  # xla, or cudnn: on NVIDIA GPUs, bfloat16; auto: cudnn where it works

    cfg.experts = experts = ConfigDict()
    # Ordered (regex, rule) pairs over leaf paths such as "layers/mlp/up"; the first match wins and
    # every leaf must match. Rules: "dense" (one full copy per expert), "low_rank:8" (on matrices:
    # two factors of that rank per expert; soup_jax/soup/low_rank.py), "none" (shared only).
    experts.rules = ((".*", "dense"),)
    experts.init_scale = 0.0  # std of dense experts' init, as a multiple of the shared leaf's RMS
    experts.dtype = "float32"  # storage of the bank: float32 or bfloat16
    experts.rounding = "stochastic"  # of bank and moments stored in bfloat16: stochastic, nearest

    cfg.router = router = ConfigDict()
    router.hidden_dim = 64  # of the MLP h -> alpha; 0: linear only
    router.init = "centroids"  # of its linear part: random, or centroids (domain geometry)
    router.center = True  # the router sees h minus the natural frequencies
    router.normalization = "ball"  # of alpha: none, softmax, tanh, l2, ball (soup_jax/soup/router)
    router.scale = 1.0  # alpha is multiplied by this after normalisation

    cfg.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 3e-3  # peak, of the shared parameters
    optimizer.schedule = "cosine"  # cosine, wsd (flat, then linear decay) or constant
    optimizer.warmup_steps = 100  # linear, up to learning_rate
    optimizer.decay_steps = 200  # length of the decay of "wsd", ending at num_steps
    optimizer.final_fraction = 0.1  # of the peak rate at the end of the decay
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.95
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.1  # decoupled; matrices only (leaves of two or more dimensions)
    optimizer.clip_norm = 1.0  # of the global gradient norm, experts included; 0: off
    optimizer.grad_accumulation = 1  # micro-batches per step; divides the rows of a mixture
    # Of dense experts: merged (preconditioned in the merged space) or adamw. Low-rank factors have
    # AdamW with float32 moments always, and are never deferred.
    optimizer.bank = "merged"
    optimizer.flush_every = 1  # T: updates of the bank deferred for T steps; only "merged" can
    optimizer.moment_dtype = "float32"  # storage of the bank's moments: float32 or bfloat16
    optimizer.bank_lr_scale = 0.3  # of learning_rate, for the experts
    optimizer.router_lr_scale = 1.0  # of learning_rate, for the router

    cfg.mesh = mesh = ConfigDict()
    mesh.replica = -1  # groups of devices that hold different mixtures; -1: gcd(M, devices)
    mesh.fsdp = -1  # devices inside such a group; -1: the rest
    mesh.platform = ""  # cpu, gpu or tpu; anything else found is an error. Empty: take any
    mesh.num_devices = 0  # expected device count, checked at start. 0: take what is there

    mesh.gather = "step"  # when a merged model gets whole in its group: step, or layer by layer

    cfg.distributed = distributed = ConfigDict()
    distributed.init_timeout_secs = 300  # for all processes to connect; names who is missing
    distributed.heartbeat_timeout_secs = 100  # silence after which a process counts as dead
    distributed.step_timeout_secs = 1800  # no step done for so long: stacks, exit. 0: never

    cfg.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 500  # and always at the end and at SIGTERM; 0: only then
    checkpoint.keep_latest = 2
    checkpoint.keep_every = 0  # steps whose multiples are kept for ever; 0: none
    checkpoint.async_timeout_secs = 1200  # a save that takes longer fails the run

    cfg.log = log = ConfigDict()
    log.every_steps = 20  # metrics.jsonl, TensorBoard and the progress bar
    log.tensorboard = True
    log.peak_tflops = 0.0  # of one device, for MFU; 0: known chips are looked up, else no MFU

    cfg.evaluate = evaluate = ConfigDict()
    evaluate.specialists = ()  # files or globs of specialist documents; a file is a specialist
    evaluate.every_steps = 0  # during training; 0: never
    evaluate.histogram_fraction = 0.5  # of a specialist's documents, by hash: they give h
    evaluate.tuning_fraction = 0.2  # likewise: scored during training; `evaluate` scores the rest
    evaluate.max_windows = 256  # scored per document set, evenly spread over it; 0: all
    evaluate.batch_size = 32  # windows per forward pass
    set_model(cfg, preset)
    return cfg.lock()
