"""What the studies of this folder share: a corpus, runs trained by `soup-jax sweep`, and scores.

A study lies in a folder, and every command goes on where it was: runs that are done are not trained
again, and scores are kept beside the run (scores.json). DATA has a folder `generic` of source files
and a folder `specialists` with one file of documents for each specialist.

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
from soup_jax.data.corpus import open_corpus
from soup_jax.data.domain_histogram import document_histogram
from soup_jax.evaluation import sets as sets_lib
from soup_jax.hardware import compile_cache
from soup_jax.specialists.open import load
from soup_jax.specialists.search import batches, mean_loss
from soup_jax.sweeps import points
from soup_jax.training import build

ROOT = pathlib.Path(__file__).parents[2]
METHODS = ROOT / "experiments" / "paper" / "methods.py"
LEVELS = (16, 64, 256)
VALIDATION = "validation"


def arguments(doc, **more):
    """The flags of a study."""
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder with generic/ and specialists/")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("paper"))
    parser.add_argument("--corpus", type=pathlib.Path, help="default: OUT/corpus")
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
        self.given, self.out, self._cache = given, given.out, {}
        self.seeds = [int(s) for s in given.seeds.split(",")]
        self.place = given.corpus or self.out / "corpus"
        self.data = pathlib.Path(given.data)
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

    def command(self, *words):
        """Run a subcommand of soup-jax; ends the study if it fails."""
        done = subprocess.run([sys.executable, "-m", "soup_jax.cli", *words], cwd=ROOT)
        if done.returncode:
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

    def train(self, name, method, *, seeds=None, axes=None, **fields):
        """{values of the seed and of each axis: folder} of a sweep of runs, trained where not done.

        Args:
          name: of the sweep's folder.
          axes: field -> values.
          fields: of the config, with two underscores for the dot.
        """
        axes = {"seed": self.seeds if seeds is None else seeds, **(axes or {})}
        folder = self.out / "runs" / name
        words = [f"--config={METHODS}:{method},{self.given.size}", f"--workdir={folder.absolute()}"]
        words += [points.argument("corpus.dir", str(self.place.absolute()))]
        words += [points.argument(f.replace("__", "."), v) for f, v in fields.items()]
        words += [f"--sweep.{f}={','.join(map(str, values))}" for f, values in axes.items()]
        self._kept(tuple(words), lambda: self.command("sweep", *words, f"--jobs={self.given.jobs}"))
        made = points.load(folder).points
        return {tuple(p.overrides[field] for field in axes): folder / p.name for p in made}

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
        from soup_jax.experiments.paper import methods

        cfg = methods.get_config(f"soup,{self.given.size}")
        cfg.evaluate.max_windows = self.given.windows
        return cfg

    @functools.cached_property
    def validation(self):
        """Windows of the generic validation split."""
        most = self.config.evaluate.max_windows
        return sets_lib.validation_set(self.corpus(LEVELS[-1]), max_windows=most)

    def h(self, num_domains):
        """{specialist: float64 [K]}, histograms at a level; kept as files that configs take."""
        return self._kept(("h", num_domains), lambda: self._histograms(num_domains))

    def _histograms(self, num_domains):
        folder = self.out / "weights" / str(num_domains)
        if not (folder / "done").exists():
            for name, one in self.sets().items():
                found = document_histogram(self.corpus(num_domains), one.for_h)
                files.write_json(folder / f"{name}.json", [float(x) for x in found.h_K])
            (folder / "done").touch()
        return {p.stem: np.array(json.loads(p.read_text())) for p in sorted(folder.glob("*.json"))}

    def weights(self, name, num_domains, h_K=None):
        """The file of a specialist's domain weights, or of those that are given."""
        folder = self.out / "weights" / str(num_domains)
        if h_K is None:
            self.h(num_domains)
        else:
            folder = folder / "other"
            files.write_json(folder / f"{name}.json", [float(x) for x in h_K])
        return str((folder / f"{name}.json").absolute())

    # Scores

    def windows(self, name, part="final"):
        """What is scored of a specialist, or of the generic validation split."""
        return self.validation if name == VALIDATION else self.sets(part)[name].scored

    def scores(self, run, column, names=None, *, part="final", average=1):
        """{name: nats per token} of a run; kept beside it.

        Args:
          column: "specialist" (merged at the h of each set, at the natural frequencies for the
            validation split), "generic_h" or "shared"; they are the same without experts.
          names: of specialists, and VALIDATION; default: all.
          average: take the mean of the last so many checkpoints.
        """
        names = [*self.sets(part), VALIDATION] if names is None else names
        path = pathlib.Path(run) / "scores.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        key = f"{part}/{average}/{column}/{self.given.windows}"
        known = kept.setdefault(key, {})
        missing = [name for name in names if name not in known]
        if missing:
            soup = self.open(run, average=average).resident()
            thetas = self._thetas(soup, column, missing)
            for name in missing:
                known[name] = mean_loss(soup.model, thetas(name), self.windows(name, part))
            files.write_json(path, kept)
        return {name: known[name] for name in names}

    def _thetas(self, soup, column, names):
        if column == "shared" or not soup.num_experts:
            return lambda name: soup.params["shared"]
        generic_K = soup.map.domain_frequencies
        h = self.h(soup.num_domains)
        weights = {n: generic_K if column == "generic_h" else h.get(n, generic_K) for n in names}

        def theta(name):
            return soup.on_devices(soup.coefficients(weights[name][None])[0])

        return theta


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(losses, params, rows):
    nats, weights = losses(params, rows)
    return -nats, weights


def ensemble_loss(model, models, weights, scored):
    """Nats per token of sum_k weights[k] p_k: the models' probabilities mixed."""
    total = count = 0.0
    log_w = np.log(np.maximum(np.asarray(weights, np.float64), 1e-300))
    for rows in batches(scored):
        found = [_log_probabilities(model.example_losses, p, rows) for p in models]
        mixed = jax.nn.logsumexp(jnp.stack([lp + w for (lp, _), w in zip(found, log_w)]), axis=0)
        total -= float((mixed * found[0][1]).sum())
        count += float(found[0][1].sum())
    return total / count


def mean_params(models, weights):
    """The weighted mean of parameters."""
    return jax.tree.map(lambda *x: sum(w * leaf for w, leaf in zip(weights, x)), *models)
