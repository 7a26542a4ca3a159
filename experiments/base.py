"""Every field a soup_jax config can have: default, meaning, what is allowed. There is no other.

A config file is a program whose `get_config()` returns this dictionary with some values changed;
`soup_jax.config.schema` refuses a field that is not declared here. The optional argument names a
model preset: `--config=experiments/base.py:110m`.

Any field is set from the command line as `--config.section.field=value`; a tuple of strings takes
`--config.corpus.sources=a,b` as one string each in Python notation: `"('a','b')"`.

The first word of a declaration says what a run that has started may do with the field:

    fixed      nothing: shapes, data, method and seed are those of the first start
    tunable    change it from the next step on, with `soup-jax train --accept_changes`
    free       change it at every start: no number of the run depends on it, but for the order
               of sums on another mesh
"""

from ml_collections import ConfigDict

from soup_jax.config.fields import fixed, free, new_config, tunable

DTYPES = ("float32", "bfloat16")

# By hand, so that a field is a line or two.
# fmt: off
FIELDS = (
    free("name", "base", "of the run, in logs and recipes"),
    fixed("seed", 0, "of the model's init and of the sampling plan; not of the corpus", at_least=0),
    fixed("num_domains", 16, "K, clusters the corpus is cut into, or those of a coarser level",
          at_least=1),
    fixed("num_experts", 8, "E; 0 is the generic model through the same code", at_least=0),
    fixed("num_mixtures", 1, "M, domain-weight vectors per step; divides batch_size", at_least=1),
    # 256 bytes and the end-of-text token are the least.
    fixed("vocab_size", 4096, "V, of the tokenizer that `prepare` trains, and of the model",
          at_least=257),
    fixed("seq_len", 256, "L, tokens per window", at_least=1),
    fixed("batch_size", 64, "B, windows per step over all devices", at_least=1),
    tunable("num_steps", 1000, "optimizer updates; tokens = num_steps * batch_size * seq_len",
            at_least=1),
    tunable("skip_batches", (), "(first, last) pairs, ascending and both included, of steps of the"
            " sampling plan whose batches are left out: ((4100, 4105),)"),

    free("corpus.dir", "corpus", "the prepared corpus: written by `prepare`, read by the rest"),
    free("corpus.cache_dir", "",
         "where files of a corpus at gs:// or s3:// are kept; empty: below $SOUP_JAX_CACHE_DIR, or "
         "~/.cache/soup_jax"),
    free("corpus.sources", (),
         "files, folders or globs, gs:// and s3:// too: .txt .md .py ..., .jsonl[.gz|.zst], "
         ".parquet"),
    fixed("corpus.text_field", "text", "of a JSON line or Parquet row"),
    fixed("corpus.validation_fraction", 0.02, "of the documents, by hash", at_least=0),
    fixed("corpus.held_out_fraction", 0.0, "likewise; nothing here reads it: for the final word",
          at_least=0),
    fixed("corpus.min_chars", 1, "shorter documents are dropped, counted and reported", at_least=0),
    fixed("corpus.max_chars", 1_000_000, "longer documents are cut into pieces of this size",
          at_least=1),
    fixed("corpus.levels", (), "fewer domains, ascending, that `prepare` cuts first and then these "
          "into num_domains; a training may take a level. (): none, or sqrt(K) above K = 1024"),
    fixed("corpus.domain_field", "",
          "of a JSON line or Parquet row: the number or name of the document's domain, for sources "
          "that are clustered already; empty: k-means"),
    fixed("corpus.near_duplicates", 0.0,
          "of two documents whose word 5-grams have this Jaccard similarity, estimated, the later "
          "is dropped; 0: not looked for; 0.8 is usual, below 0.7 many are missed",
          at_least=0, at_most=1),
    free("corpus.evaluation", (),
         "files of documents to score specialists on, which must not be trained on, as `sources`"),
    fixed("corpus.evaluation_text_field", "", "of `evaluation`; empty: as `text_field`"),
    fixed("corpus.contaminated", "drop",
          "what happens to documents that have 70% of the word 8-grams of one of them",
          choices=("drop", "report")),
    free("corpus.num_workers", 0, "processes that tokenise and embed; 0: one per CPU core",
         at_least=0),

    fixed("tokenizer.path", "", "a tokenizer.json to take; empty: train a byte-level BPE"),
    fixed("tokenizer.train_bytes", 50_000_000, "about how much text the BPE is trained on",
          at_least=1),

    fixed("embed.kind", "tfidf_svd",
          'the document embedder: tfidf_svd, minilm, or "package.module:Class"'),
    fixed("embed.path", "", "of minilm: a sentence-transformers folder; empty: all-MiniLM-L6-v2"),
    fixed("embed.dim", 128, "of tfidf_svd: numbers after the SVD", at_least=1),
    fixed("embed.max_features", 30_000, "of tfidf_svd: words and word pairs kept", at_least=1),
    fixed("embed.fit_documents", 50_000, "documents TF-IDF, SVD and k-means are fitted on, at most",
          at_least=1),
    fixed("embed.max_chars", 20_000, "of a document that are looked at", at_least=1),

    # The meta-distribution pi over h: components whose probabilities add up to 1. Shares,
    # sizes and exponent were chosen on the runs of experiments/minipile.py; its docstring has the
    # measurements, those of the router and of the bank's learning rate below too.
    fixed("domain_weights.sparse", 0.8,
          "h with support_size domains, uniform weights, normalised", at_least=0),
    fixed("domain_weights.generic", 0.2, "the natural domain frequencies", at_least=0),
    fixed("domain_weights.dirichlet", 0.0,
          "Dirichlet(concentration * natural frequencies)", at_least=0),
    fixed("domain_weights.file", 0.0,
          "a row of `path`, drawn uniformly; one row: a fixed h (CRISP)", at_least=0),
    fixed("domain_weights.support_size", 16, "s of the sparse component, largest value",
          at_least=1),
    fixed("domain_weights.min_support_size", 1, "and smallest; between them log-uniformly drawn",
          at_least=1),
    fixed("domain_weights.support_exponent", 1.0,
          "draw these domains by frequency ** this; 0: uniformly", at_least=0),
    fixed("domain_weights.concentration", 8.0, "of the Dirichlet component", above=0),
    fixed("domain_weights.path", "",
          ".json: a list of K numbers, a list of such lists, or a recipe.json"),
    fixed("domain_weights.components", (),
          '(name or "package.module:make", probability[, ((argument, value), ...)]) of more'),

    free("loader.num_threads", 2, "grain threads that read batches", at_least=1),
    free("loader.prefetch", 8, "batches read ahead, per process", at_least=1),

    fixed("model.kind", "llama",
          "the shipped decoder, or a dotted path to one of your own: my_package.nets:make"),
    fixed("model.num_layers", 2, "N", at_least=1),
    fixed("model.dim", 64, "D", at_least=1),
    fixed("model.num_heads", 4, "H", at_least=1),
    fixed("model.num_kv_heads", 4, "divides num_heads: grouped-query attention", at_least=1),
    fixed("model.hidden_dim", 192, "F, of the SwiGLU MLP", at_least=1),
    fixed("model.tie_embeddings", True, "the output projection is the embedding's transpose"),
    fixed("model.rope_theta", 10_000.0, "base of the rotary position embedding", above=0),
    fixed("model.norm_eps", 1e-5, "of RMSNorm", above=0),
    fixed("model.dtype", "float32",
          "of activations and of the merged weights. Accelerators multiply float32 in fewer bits "
          "unless JAX_DEFAULT_MATMUL_PRECISION=highest", choices=DTYPES),
    fixed("model.remat", "none", "recompute in the backward pass; dots: all but matmuls",
          choices=("none", "full", "dots")),
    fixed("model.loss_chunk", 0, "positions whose logits exist at once; divides seq_len. 0: all",
          at_least=0),
    fixed("model.attention_reset", -1,
          "the corpus's end-of-text token: from it on, attention sees nothing before it, so that a "
          "document sees no other in its window. -1: it sees the whole window", at_least=-1),
    fixed("model.args", (), 'pairs for a network of your own, such as (("window", 64),)'),
    fixed("model.attention", "auto",
          "cudnn: on NVIDIA GPUs, bfloat16; auto: cudnn where it works, else xla",
          choices=("auto", "xla", "cudnn")),

    # Ordered (regex, rule) pairs over leaf paths such as "layers/mlp/up"; the first match wins and
    # every leaf must match. Rules: "dense" (one full copy per expert), "low_rank:8" (on matrices:
    # two factors of that rank per expert; soup_jax/soup/low_rank.py), "none" (shared only).
    fixed("experts.rules", ((".*", "dense"),), "which leaves have experts, of which kind"),
    fixed("experts.init_scale", 0.0,
          "std of dense experts' init, as a multiple of the shared leaf's RMS", at_least=0),
    fixed("experts.dtype", "float32", "storage of the bank", choices=DTYPES),
    fixed("experts.rounding", "stochastic", "of bank and moments stored in bfloat16",
          choices=("stochastic", "nearest")),

    fixed("router.hidden_dim", 64, "of the MLP h -> alpha; 0: linear only", at_least=0),
    fixed("router.init", "centroids", "of its linear part; centroids: the geometry of the domains",
          choices=("random", "centroids")),
    fixed("router.center", True, "the router sees h minus the natural frequencies"),
    fixed("router.normalization", "ball", "of alpha (soup_jax/soup/router.py)",
          choices=("none", "softmax", "tanh", "l2", "ball")),
    fixed("router.scale", 1.0, "alpha is multiplied by this after normalisation", above=0),

    tunable("optimizer.learning_rate", 3e-3, "peak, of the shared parameters", above=0),
    tunable("optimizer.schedule", "cosine", "of the rate, by step; wsd: flat, then linear decay",
            choices=("cosine", "wsd", "constant")),
    tunable("optimizer.warmup_steps", 100, "linear, up to learning_rate", at_least=0),
    tunable("optimizer.decay_steps", 200, "length of the decay of wsd, ending at num_steps",
            at_least=0),
    tunable("optimizer.final_fraction", 0.1, "of the peak rate at the end of the decay",
            at_least=0, at_most=1),
    tunable("optimizer.beta1", 0.9, "of the mean of gradients", at_least=0, below=1),
    tunable("optimizer.beta2", 0.95, "of the mean of their squares", at_least=0, below=1),
    fixed("optimizer.eps", 1e-8, "added to the root of that mean", above=0),
    tunable("optimizer.weight_decay", 0.1,
            "decoupled; matrices only (leaves of two or more dimensions)", at_least=0),
    tunable("optimizer.clip_norm", 1.0, "of the global gradient norm, experts included; 0: off",
            at_least=0),
    fixed("optimizer.grad_accumulation", 1, "micro-batches per step; divides the rows of a mixture",
          at_least=1),
    fixed("optimizer.shared", "adamw",
          "of the shared parameters and the router: adamw, muon, one of optax's as in optax.lion, "
          "or a dotted path (soup_jax/optim/shared.py)"),
    fixed("optimizer.shared_args", (), 'pairs that it gets, as in (("b1", 0.95),)'),
    # Low-rank factors have AdamW with float32 moments always.
    fixed("optimizer.bank", "merged",
          "of dense experts: merged (preconditioned in the merged space), adamw, or a dotted path "
          "(soup_jax/optim/bank.py)"),
    fixed("optimizer.moment_dtype", "float32", "storage of the bank's moments", choices=DTYPES),
    tunable("optimizer.bank_lr_scale", 0.3, "of learning_rate, for the experts", at_least=0),
    tunable("optimizer.bank_step_bound", 4.5,
            "merged: largest step of a number of the bank, in units of its rate times alpha; "
            "0: no bound",
            at_least=0, before=0.0),
    tunable("optimizer.router_lr_scale", 1.0, "of learning_rate, for the router", at_least=0),

    free("mesh.replica", -1, "groups of devices, of different mixtures; -1: gcd(M, devices)"),
    free("mesh.fsdp", -1, "devices inside such a group; -1: the rest"),
    free("mesh.platform", "", "cpu, gpu or tpu; anything else found is an error. Empty: any",
         choices=("", "cpu", "gpu", "tpu")),
    free("mesh.num_devices", 0, "expected, checked at start. 0: take what is there", at_least=0),
    free("mesh.gather", "step",
         "when a merged model gets whole in its group: step, or layer by layer",
         choices=("step", "layer")),

    free("distributed.init_timeout_secs", 300, "for all processes to connect; names who is missing",
         at_least=1),
    # Processes report every second.
    free("distributed.heartbeat_timeout_secs", 100, "silence after which a process counts as dead",
         at_least=5),
    free("distributed.step_timeout_secs", 1800, "no step done for so long: stacks, exit. 0: never",
         at_least=0),

    free("checkpoint.every_steps", 500, "and always at the end and at SIGTERM; 0: only then",
         at_least=0),
    free("checkpoint.keep_latest", 2, "newest checkpoints kept", at_least=1),
    free("checkpoint.keep_every", 0, "steps whose multiples are kept for ever; 0: none",
         at_least=0),
    free("checkpoint.async_timeout_secs", 1200, "a save that takes longer fails the run",
         at_least=1),
    # State comes from the newest checkpoint of the workdir; if it has none, from init_from; if that
    # is empty, from the seed.
    fixed("checkpoint.init_from", "",
          "a run whose parameters a new run starts from, or a Llama of transformers as its S"),
    fixed("checkpoint.init_step", 0, "of its checkpoints; 0: the newest", at_least=0),

    free("log.every_steps", 20, "metrics.jsonl, trackers and the progress bar", at_least=1),
    free("log.trackers", ("tensorboard",),
         'beside metrics.jsonl: tensorboard, wandb, trackio or "package.module:make"'),
    free("log.profile", (),
         "first and last step, counted from 1, of which a profiler trace goes to RUN/profile"),
    free("log.peak_tflops", 0.0, "of one device, for MFU; 0: as known of the chip, else no MFU",
         at_least=0),

    free("evaluate.specialists", (),
         "files or globs of specialist documents; a file is a specialist"),
    free("evaluate.every_steps", 0, "during training; 0: never", at_least=0),
    free("evaluate.histogram_fraction", 0.5, "of a specialist's documents, by hash: they give h",
         above=0),
    free("evaluate.tuning_fraction", 0.2,
         "likewise: scored during training; `evaluate` scores the rest", at_least=0),
    free("evaluate.max_windows", 256, "scored per document set, evenly spread over it; 0: all",
         at_least=0),
    free("evaluate.batch_size", 32, "windows per forward pass", at_least=1),
)
# fmt: on

# The paper's model sizes, with the usual Llama proportions. Parameter counts (without experts)
# are printed by `soup-jax train` and held by tests/base_model_test.py.
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
    cfg.domain_weights.components = ()


def get_config(preset: str = "tiny") -> ConfigDict:
    """The full config with every default; `preset` is one of MODEL_PRESETS."""
    cfg = new_config(FIELDS)
    set_model(cfg, preset)
    return cfg.lock()
