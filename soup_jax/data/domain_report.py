"""The domains of a corpus in words and as a picture; how often a run will repeat each of them."""

import pathlib
from typing import Any

import numpy as np
import threadpoolctl
from ml_collections import ConfigDict

from soup_jax import storage as files
from soup_jax.data.corpus import Corpus
from soup_jax.data.domain_map import DomainMap
from soup_jax.data.meta_distribution import (
    MetaDistribution,
    from_config,
    sample_domain_weights,
)
from soup_jax.errors import UserError

# A domain whose windows a run sees more often than this is warned of.
MOST_EPOCHS = 10
_DRAWS = 4096
_NAMED = 40  # domains of the picture, the largest
_DISCS = 30_000  # square points, the area of all discs together


def rows(domain_map: DomainMap) -> list[dict[str, Any]]:
    """The entries of domains.json with their share of train windows, the largest first."""
    found = [
        {**entry, "domain": k, "share": float(domain_map.domain_frequencies[k])}
        for k, entry in enumerate(domain_map.domains)
    ]
    return sorted(found, key=lambda row: -row["share"])


def table(domain_map: DomainMap, *, most: int = 0) -> str:
    """`rows` as aligned text, the first `most` of them; 0: all."""
    lines = ["domain    share  documents   windows  words"]
    found = rows(domain_map)
    for row in found[: most or None]:
        documents = row.get("documents", {}).get("train", 0)
        words = " ".join(row.get("terms", [])[:8]) or row["label"]
        lines.append(
            f"{row['domain']:>6}  {row['share']:>6.2%}  {documents:>9,}  "
            f"{row['windows']['train']:>8,}  {words}"
        )
    if 0 < most < len(found):
        rest = sum(row["share"] for row in found[most:])
        lines.append(f"   ...  {rest:>6.2%}  {len(found) - most} more")
    return "\n".join([*lines, domain_map.balance()])


def positions(centroids: np.ndarray) -> np.ndarray:
    """float64 [K, 2]: a place in the plane for each centroid, those that are alike side by side."""
    import sklearn.decomposition
    import sklearn.manifold

    num, dim = centroids.shape
    with threadpoolctl.threadpool_limits(1):
        if num < 5:
            plane = min(2, num, dim)
            flat = sklearn.decomposition.PCA(plane, random_state=0).fit_transform(centroids)
            return np.pad(flat.astype(np.float64), ((0, 0), (0, 2 - plane)))
        return sklearn.manifold.TSNE(
            metric="cosine",
            init="random",
            perplexity=min(30, (num - 1) / 3),
            random_state=0,
        ).fit_transform(centroids)


def draw(
    domain_map: DomainMap, out: pathlib.Path, *, weights_K: np.ndarray | None = None
) -> pathlib.Path:
    """Draw the domains in the plane: a disc each, its area the share of train windows.

    Args:
      out: .png, .svg or .pdf.
      weights_K: colours the discs by weights, such as the histogram of documents.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    place, share = positions(domain_map.centroids()), domain_map.domain_frequencies
    figure, axes = plt.subplots(figsize=(11, 8), layout="constrained")
    size = np.clip(_DISCS * share, 4, _DISCS / 8)
    colours: Any = "tab:blue" if weights_K is None else weights_K
    x, y = place.T
    discs = axes.scatter(x, y, s=size, c=colours, alpha=0.5, linewidths=0.5, edgecolors="k")
    if weights_K is not None:
        figure.colorbar(discs, ax=axes, label="weight", shrink=0.6)
    named = np.argsort(-(share if weights_K is None else weights_K), kind="stable")[:_NAMED]
    for k in named:
        axes.annotate(domain_map.label(int(k)), place[k], fontsize=7, ha="center", va="center")
    title = f"{domain_map.num_domains} domains; area: share of the train windows"
    axes.set(xticks=[], yticks=[], title=title)
    axes.margins(0.08)
    with files.atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=120, format=out.suffix[1:])
    plt.close(figure)
    return out


def epochs(meta: MetaDistribution, num_windows_K: np.ndarray, num_rows: int) -> np.ndarray:
    """float64 [K]: how often a run of so many windows in all sees each window of a domain.

    By the mean of draws from the meta-distribution; a component that changes with the step is
    taken as it is at its beginning.
    """
    rng = np.random.default_rng(0)
    mean_K = sample_domain_weights(meta, rng, step=0, num_mixtures=_DRAWS).mean(axis=0)
    return num_rows * mean_K / np.maximum(num_windows_K, 1)


def repetition_warning(cfg: ConfigDict, corpus: Corpus) -> str:
    """A sentence on the domains that a config's run sees more than MOST_EPOCHS times; "" for none,
    and for a meta-distribution that cannot be made yet, such as that of a file to be written."""
    try:
        meta = from_config(cfg, corpus.domain_frequencies)
    except UserError:  # `train` will say it
        return ""
    num_windows_K = np.diff(corpus.offsets["train"])
    found = epochs(meta, num_windows_K, cfg.num_steps * cfg.batch_size)
    if not (words := repeated(found, corpus, num_steps=cfg.num_steps)):
        return ""
    return (
        f"{words}. Their text will be learnt by heart: cut fewer domains (num_domains), add text, "
        "train for fewer steps, or draw small domains less often (domain_weights.support_exponent)"
    )


def repeated(times_K: np.ndarray, domain_map: DomainMap, *, num_steps: int) -> str:
    """Words on the domains that a run sees more than MOST_EPOCHS times; "" for none."""
    over = int((times_K > MOST_EPOCHS).sum())
    if not over:
        return ""
    worst = np.argsort(-times_K, kind="stable")[: min(over, 3)]
    names = ", ".join(f"{domain_map.label(int(k))} ({times_K[k]:.0f} times)" for k in worst)
    return (
        f"{over} of {domain_map.num_domains} domains will be seen more than {MOST_EPOCHS} times in "
        f"{num_steps} steps: {names}{', ...' if over > 3 else ''}"
    )
