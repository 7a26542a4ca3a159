"""Domains that the sources' records name: their names in order, and a centroid for each.

A specialist's documents name none, so its domain weights come from the nearest centroid as ever:
the mean of the train documents of each given domain.
"""

import numpy as np

from soup_jax import inputs
from soup_jax.data.embed.base import unit_rows
from soup_jax.data.prepare import shards
from soup_jax.data.prepare.work import Work, progress, say
from soup_jax.errors import UserError


def given_domains(work: Work) -> list[str]:
    """Names of the domains that were read, in the order of the domains: numbers by size, else names
    by their characters; empty where none are asked for."""
    if not work.cfg.corpus.domain_field:
        return []
    names: set[str] = set()
    for i in range(len(shards.groups(work.sources))):
        state = inputs.read_json(work.path / "documents" / f"{i:06d}.json", {"domains": [str]})
        names.update(state["domains"])
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))  # "7" and "07" are two
    return sorted(names)


def given_centroids(work: Work) -> dict[str, np.ndarray]:
    """`centroids`, the direction of the mean of each given domain's train documents, float32
    [K, dim], and `given`, uint64 [K], by which shards name the domains.

    Raises:
      UserError: a domain has no train document whose embedding says anything.
    """
    names = given_domains(work)
    keys = shards.domain_keys(names)
    order = np.argsort(keys)
    total: np.ndarray | None = None
    both = zip(work.documents, work.shards("encoded"))
    for source, encoded in progress(both, "averaging the domains", total=len(work.documents)):
        shard = shards.load(source, "split", "domain")
        embeddings = shards.load(encoded, "embeddings")["embeddings"].astype(np.float64)
        if total is None:
            total = np.zeros((len(names), embeddings.shape[1]))
        domain = order[np.searchsorted(keys, shard["domain"], sorter=order)]
        train = shard["split"] == 0
        np.add.at(total, domain[train], embeddings[train])
    assert total is not None
    centroids = unit_rows(total)
    empty = [names[k] for k in np.flatnonzero(~centroids.any(axis=1))]
    if empty:
        raise UserError(
            f"of the domains {', '.join(map(repr, empty[:10]))} in the field "
            f"{work.cfg.corpus.domain_field!r} no train document with known words is left, and a "
            "specialist's documents could not be told to be of them: leave their records out, or "
            "join them with other domains"
        )
    say(f"took {len(names):,} domains from the field {work.cfg.corpus.domain_field!r}")
    return {"centroids": centroids, "given": keys}
