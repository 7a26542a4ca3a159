"""What the studies of this folder share: a corpus, runs trained by `soup-jax sweep`, and scores.

A study lies in a folder, and every command goes on where it was: runs that are done are not trained
again (the version of the code is not part of their names: take another folder after a change that
moves losses), studies share them, and scores are kept beside the run (scores.json), by the windows
that were scored. A run's folder is named by size, corpus, the config of its method (eight digits),
and all in which its own differs. DATA has a folder `generic` of source files and a folder
`specialists` with one file of documents for each specialist.

Scores are nats per token. Documents of a specialist are split as `soup-jax evaluate` splits them:
one part gives h, `tuning` chooses settings, `final` is reported.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from soup_jax import storage as files
from soup_jax.config.schema import flat_items
from soup_jax.data.corpus import open_corpus
from soup_jax.data.domain_histogram import document_histogram
from soup_jax.evaluation import sets as sets_lib
from soup_jax.experiments.paper import methods
from soup_jax.hardware import compile_cache
from soup_jax.specialists.open import load
from soup_jax.specialists.search import batches, mean_loss, window_nats
from soup_jax.sweeps import points, table
from soup_jax.training import build

ROOT = pathlib.Path(__file__).parents[2]
METHODS = ROOT / "experiments" / "paper" / "methods.py"
LEVELS = (16, 64, 256)
VALIDATION = "validation"
OTHER_DATA = 1000  # added to the seed of a branch: it reads other windows than its start did


def arguments(doc, **more):
    """The flags of a study."""
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder with generic/ and specialists/")
    parser.add_argument("--out", default="paper")
    parser.add_argument("--corpus", default="", help="default: OUT/corpus")
    parser.add_argument("--size", default="small")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time; 0: as many as fit")
    parser.add_argument("--windows", type=int, default=64, help="scored of a set, at most")
    for name, (default, text) in more.items():
        parser.add_argument(f"--{name}", default=default, type=type(default), help=text)
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Set:
    """A specialist: the texts that give h, and the windows that are scored."""

    for_h: list
    scored: sets_lib.TokenSet


class Study:
    """A folder of runs on one corpus."""

    def __init__(self, given):
        """Of `arguments`; prepares the corpus if it is not there."""
        compile_cache.enable()
        self.given, self.out, self._cache = given, pathlib.Path(given.out).resolve(), {}
        self.seeds = [int(s) for s in given.seeds.split(",")]
        self.place = pathlib.Path(given.corpus or self.out / "corpus").resolve()
        self.data = pathlib.Path(given.data).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        if not (self.place / "manifest.json").exists():
            self.command(
                "prepare",
                f"--config={METHODS}:soup,{given.size}",
                f"--config.corpus.sources={self.data / 'generic'}",
                f"--config.corpus.dir={self.place}",
                f"--config.num_domains={LEVELS[-1]}",
                f"--config.corpus.levels={LEVELS[:-1]!r}",
            )

    def command(self, *words, fails=False):
        """Run a subcommand of soup-jax; ends the study if it fails, unless it may."""
        done = subprocess.run([sys.executable, "-m", "soup_jax.cli", *words], cwd=ROOT)
        if done.returncode and not fails:
            raise SystemExit(f"soup-jax {' '.join(words)} ended with {done.returncode}")

    def corpus(self, num_domains):
        """At a level."""
        key = ("corpus", num_domains)
        return self._kept(key, lambda: open_corpus(self.place, num_domains=num_domains))

    def _kept(self, key, make):
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def open(self, run, **more):
        """A run; networks of the same settings are one object, which is compiled once."""
        soup = load(run, **more)
        settings = (soup.cfg.model.kind, build.model_settings(soup.cfg))
        return dataclasses.replace(soup, model=self._kept(settings, lambda: soup.model))

    # Training

    def train(self, method, *, tag="", seeds=None, axes=None, fails=False, **fields):
        """{values of the seed and of each axis: folder} of runs, trained where not done.

        Args:
          tag: tells apart sweeps of a method over different axes.
          axes: field -> values.
          fails: runs that fail are left out; else they end the study.
          fields: of the config, with two underscores for the dot. The warm-up is 100 steps, or a
            tenth of the run if that is less.
        """
        cfg = dict(flat_items(methods.get_config(f"{method},{self.given.size}")))
        given = {name.replace("__", "."): value for name, value in fields.items()}
        steps = given.get("num_steps", cfg["num_steps"])
        given = {"optimizer.warmup_steps": min(100, max(steps // 10, 1)), **given}
        given = {name: value for name, value in given.items() if value != cfg[name]}
        axes = {"seed": self.seeds if seeds is None else seeds, **(axes or {})}
        corpus = self.corpus(LEVELS[-1]).fingerprint[:8]
        folder = self.out / "runs" / f"{self.given.size}-{corpus}"
        own = files.sha256_bytes(repr(sorted(cfg.items())).encode())[:8]
        folder /= f"{method}-{own}{tag},{points.name_of(given)}"
        overrides = points.product([{}], axes)
        runs = {tuple(o.values()): folder / points.name_of(o) for o in overrides}
        if not all(map(done, runs.values())):
            given |= {"corpus.dir": str(self.place), "loader.num_threads": 1}
            words = [points.argument(name, value) for name, value in given.items()]
            if "checkpoint.every_steps" not in given:
                words += ["--config.checkpoint.every_steps=0"]
            words += [f"--sweep.{field}={','.join(map(str, v))}" for field, v in axes.items()]
            self.command(
                "sweep",
                f"--config={METHODS}:{method},{self.given.size}",
                f"--workdir={folder}",
                f"--jobs={self.given.jobs}",
                "--retry_failed",
                *words,
                fails=True,
            )
        left = [run for run in runs.values() if not done(run)]
        if left and not fails:
            raise SystemExit(f"not trained to the end: {', '.join(map(str, left))}")
        return {key: run for key, run in runs.items() if done(run)}

    # Documents

    def sets(self, part="final"):
        """{name: Set} of the specialists."""
        return self._kept(("sets", part), lambda: self._read_sets(part))

    def _read_sets(self, part):
        cfg = self.config
        found = {}
        patterns = [str(self.data / "specialists" / "*")]
        for name, path in sets_lib.document_sets(patterns).items():
            corpus = self.corpus(LEVELS[-1])
            for_h, scored, _ = sets_lib.split_documents(name, path, corpus, cfg, part=part)
            packed = sets_lib.pack(
                corpus.tokenizer(),
                scored,
                eos_id=corpus.eos_id,
                seq_len=corpus.seq_len,
                max_windows=cfg.evaluate.max_windows,
            )
            found[name] = Set(for_h, packed)
        return found

    @functools.cached_property
    def config(self):
        cfg = methods.get_config(f"soup,{self.given.size}")
        cfg.evaluate.max_windows = self.given.windows
        return cfg

    @functools.cached_property
    def validation(self):
        """Windows of the generic validation split."""
        most = self.config.evaluate.max_windows
        return sets_lib.validation_set(self.corpus(LEVELS[-1]), max_windows=most)

    def h(self, num_domains):
        """{specialist: float64 [K]}, histograms at a level, and the natural frequencies as that of
        the validation split."""
        return self._kept(("h", num_domains), lambda: self._histograms(num_domains))

    def _histograms(self, num_domains):
        corpus, found = self.corpus(num_domains), {}
        for name, one in self.sets().items():
            texts = "".join(one.for_h).encode("utf-8", "replace")
            key = files.sha256_bytes(corpus.fingerprint.encode() + texts)[:8]
            path = self.out / "weights" / str(num_domains) / f"{name}-{key}.json"
            if not path.exists():
                h_K = document_histogram(corpus, one.for_h).h_K
                files.write_json(path, [float(x) for x in h_K])
            found[name] = np.array(json.loads(path.read_text()))
        return {**found, VALIDATION: corpus.domain_frequencies}

    def weights(self, name, h_K):
        """A file of domain weights that configs take; other weights are another file."""
        values = [float(x) for x in h_K]
        key = files.sha256_bytes(files.json_text(values).encode())[:8]
        path = self.out / "weights" / f"{name}-{key}.json"
        files.write_json(path, values)
        return str(path)

    # Scores

    def windows(self, name, part="final"):
        """What is scored of a specialist, or of the generic validation split."""
        return self.validation if name == VALIDATION else self.sets(part)[name].scored

    def scores(self, run, column, names=None, *, part="final", average=1):
        """{name: nats per token} of a run; kept beside it.

        Args:
          column: "specialist" (merged at the h of each set, at the natural frequencies for the
            validation split), "generic_h", "shared", or "windows": each window merged at the domain
            of its own text. They are the same without experts.
          names: of specialists, and VALIDATION; default: all.
          average: take the mean of the last so many checkpoints.
        """
        names = [*self.sets(part), VALIDATION] if names is None else names
        path = pathlib.Path(run) / "scores.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        known = kept.setdefault(f"{part}/{average}/{column}", {})
        keys = {name: f"{name} {self.digest(name, part)}" for name in names}
        missing = [name for name, key in keys.items() if key not in known]
        if missing:
            soup = self.open(run, average=average).resident()
            for name in missing:
                known[keys[name]] = self._score(soup, column, name, part)
            files.write_json(path, kept)
        return {name: known[key] for name, key in keys.items()}

    def digest(self, name, part="final"):
        """Eight digits of a set's windows."""
        return files.sha256_bytes(self.windows(name, part).tokens.tobytes())[:8]

    def _score(self, soup, column, name, part):
        windows = self.windows(name, part)
        if column == "shared" or not soup.num_experts:
            return mean_loss(soup.model, soup.params["shared"], windows)
        if column == "windows":
            return self._by_window(soup, windows)
        h_K = self.h(soup.num_domains)[VALIDATION if column == "generic_h" else name]
        return mean_loss(soup.model, theta(soup, h_K), windows)

    def _by_window(self, soup, windows):
        corpus = self.corpus(soup.num_domains)
        texts = [corpus.tokenizer().decode(row) for row in windows.tokens]
        found = corpus.embedder().embed(texts)
        domains, _ = corpus.tree().assign(found, corpus.domain_frequencies > 0)
        nats = 0.0
        for k in np.unique(domains):
            own = domains == k
            some = dataclasses.replace(
                windows, tokens=windows.tokens[own], num_targets=windows.num_targets[own]
            )
            params = theta(soup, np.eye(soup.num_domains)[k])
            nats += window_nats(soup.model, params, some).sum()
        return float(nats / windows.num_targets.sum())


def done(run):
    """Whether a run of a sweep was trained to its end."""
    return table.outcome(run)["state"] == "done"


def theta(soup, h_K):
    """The merged model at domain weights; the soup is resident."""
    return soup.on_devices(soup.coefficients(np.asarray(h_K)[None])[0])


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(losses, params, rows):
    nats, weights = losses(params, rows)
    return -nats, weights


def ensemble_losses(model, models, h, scored):
    """Nats per token of models whose probabilities are mixed.

    Returns:
      (of sum_k h[k] p_k for each token, of sum_k h[k] p_k for each whole window, in which the
      models that have predicted its beginning well weigh more).
    """
    tokens = whole = count = 0.0
    log_h = jnp.log(jnp.maximum(jnp.asarray(h), 1e-30))
    for rows in batches(scored):
        found = [_log_probabilities(model.example_losses, p, rows) for p in models]
        weights = found[0][1]
        lp = jnp.stack([x for x, _ in found])
        tokens -= float((jax.nn.logsumexp(lp + log_h[:, None, None], axis=0) * weights).sum())
        of_window = (lp * weights).sum(axis=-1) + log_h[:, None]
        real = weights.sum(axis=-1) > 0
        whole -= float((jax.nn.logsumexp(of_window, axis=0) * real).sum())
        count += float(weights.sum())
    return tokens / count, whole / count


def mean_params(models, weights):
    """The weighted mean of parameters."""
    return jax.tree.map(lambda *x: sum(w * leaf for w, leaf in zip(weights, x)), *models)
