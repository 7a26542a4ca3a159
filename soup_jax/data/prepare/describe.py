"""The last stage of `prepare`: domains, hashes of train documents, damage and, last, manifest."""

import json
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

from soup_jax import inputs
from soup_jax import storage as files
from soup_jax.data import domains, windows
from soup_jax.data import tokenizer as tokenizer_lib
from soup_jax.data.corpus import FORMAT_VERSION, LEVELS, TRAIN_HASHES, fingerprint_of
from soup_jax.data.damage import Report
from soup_jax.data.embed.base import load_embedder
from soup_jax.data.prepare import shards
from soup_jax.data.prepare.clean import DROPPED
from soup_jax.data.prepare.given import given_domains
from soup_jax.data.prepare.work import Work, say
from soup_jax.data.readers import short_hashes
from soup_jax.errors import UserError

# The least number of validation documents whose similarities to centroids are taken as typical.
_FOR_QUANTILES = 200
_HASHES = 1 << 24  # of train documents, sorted at a time


def describe_domains(work: Work, layout: windows.Layout) -> None:
    """Write domains.json and levels.json, and the centroids with the quantiles of similarity.

    Raises:
      UserError: a domain has no train documents.
    """
    if (work.final / "domains.json").exists():
        return
    cfg = work.cfg
    train: list[np.ndarray] = []
    validation: list[np.ndarray] = []
    documents = np.zeros((len(work.splits), cfg.num_domains), np.int64)
    agree, names = 0, given_domains(work)
    for source, path in zip(work.documents, work.shards("grouped")):
        grouped = shards.load(path, "documents", "similarity", *(["agree"] if names else []))
        agree += int(grouped.get("agree", 0))
        documents = documents + grouped["documents"].reshape(len(work.splits), -1)
        split = shards.load(source, "split")["split"]
        similarity = grouped["similarity"]
        if similarity.ndim == 1:  # of unfinished work of an earlier version
            similarity = similarity[:, None]
        # Of those that neither embedder nor centroids were fitted on, as documents to come.
        validation.append(similarity[split == 1])
        train.append(similarity[split == 0])
    tensors = shards.load(work.path / "centroids.safetensors")
    tree, similarity = domains.Tree.of(tensors), np.concatenate(validation)
    if len(similarity) < _FOR_QUANTILES:
        say(
            f"{len(similarity)} validation documents, fewer than {_FOR_QUANTILES}: those of train, "
            "which are more similar to the centroids, tell what counts as outside of the corpus"
        )
        similarity = np.concatenate(train)
    for level, size in enumerate(tree.sizes):
        name = "similarity_quantiles" + f"/{size}" * (size != tree.sizes[-1])
        quantiles = np.quantile(similarity[:, level], domains.QUANTILES)
        tensors[name] = quantiles.astype(np.float32)
    shards.save(work.final / "centroids.safetensors", tensors)
    rows = shards.choose(work.documents, num_documents=cfg.embed.fit_documents)
    texts = list(shards.chosen_texts(work.documents, rows, domains.LABEL_CHARS))
    nearest = shards.chosen_rows(work.shards("grouped"), rows, "nearest")
    terms = domains.top_terms(texts, nearest, cfg.num_domains)
    described = _entries(work, layout, terms, documents, np.arange(cfg.num_domains + 1))
    for entry, name in zip(described, names):
        entry["label"] = name
    if names:
        say(
            f"{agree / documents.sum():.0%} of the documents are nearest to the centroid of the "
            "domain that they name; a specialist's documents are counted by the nearest centroid"
        )
    empty = [entry["domain"] for entry in described if not entry["windows"]["train"]]
    if empty:
        raise UserError(f"domains {empty} have no train documents: lower --config.num_domains")
    levels = {}
    for level, size in enumerate(tree.sizes[:-1]):
        ranges = tree.ranges(level)
        coarse = np.searchsorted(ranges, nearest, side="right") - 1
        terms = domains.top_terms(texts, coarse, size)
        levels[str(size)] = _entries(work, layout, terms, documents, ranges)
    if levels:
        files.write_json(work.final / LEVELS, levels)
    files.write_json(work.final / "domains.json", described)


def _entries(
    work: Work,
    layout: windows.Layout,
    terms: list[list[str]],
    documents: np.ndarray,
    ranges: np.ndarray,
) -> list[dict[str, Any]]:
    # Of the domains of a level: the c-th is ranges[c] to ranges[c + 1] of the finest.
    described = []
    for k, of_domain in enumerate(terms):
        label = " ".join(of_domain[:3]) or f"domain {k}"
        entry: dict[str, Any] = {"domain": k, "label": label, "terms": of_domain}
        entry |= {name: {} for name in ("documents", "windows", "tokens")}
        finest = slice(ranges[k], ranges[k + 1])
        for i, split in enumerate(work.splits):
            num_windows = int(np.diff(layout.offsets[split])[finest].sum())
            entry["documents"][split] = int(documents[i, finest].sum())
            entry["windows"][split] = num_windows
            padding = int(layout.pad[split][finest].sum())
            entry["tokens"][split] = num_windows * layout.seq_len - padding
        described.append(entry)
    return described


def write_train_hashes(work: Work) -> None:
    """Write train_hashes.safetensors, by which other text is compared with the train documents."""
    path = work.final / TRAIN_HASHES
    if path.exists():
        return
    number = sum(len(shards.load(source, "split")["split"]) for source in work.documents)
    passes = -(-number // _HASHES)
    with (
        files.atomic_path(path) as new,
        tempfile.TemporaryFile(dir=work.path) as kept,
    ):
        for part in range(passes):
            found = [_train_hashes(source, part, passes) for source in work.documents]
            kept.write(np.unique(np.concatenate(found)).astype("<u8").tobytes())
        size = kept.tell()
        entry = {"dtype": "U64", "shape": [size // 8], "data_offsets": [0, size]}
        header = json.dumps({"hashes": entry}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        kept.seek(0)
        with open(new, "wb") as file:  # safetensors would want all of it in memory
            file.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(kept, file)


def _train_hashes(source: pathlib.Path, part: int, passes: int) -> np.ndarray:
    # Those in the part-th of as many ranges of equal size.
    shard = shards.load(source, "split", "hash")
    found = short_hashes(shard["hash"][shard["split"] == 0])
    half = np.uint64(32)
    return found[((found >> half) * np.uint64(passes)) >> half == part]


def _unknown(work: Work) -> int:
    # Documents of which the embedder can say nothing, and that lie in domain 0. A row of zeros has
    # the cosine 0 to all centroids, and no other row has to its nearest one.
    if work.cfg.corpus.domain_field:
        return 0
    return sum(
        int(np.count_nonzero(~similarity.reshape(len(similarity), -1).any(axis=1)))
        for path in work.shards("grouped")
        if len(similarity := shards.load(path, "similarity")["similarity"])
    )


def write_manifest(
    work: Work, layout: windows.Layout, totals: dict[str, int], report: Report
) -> None:
    """Write report.json and the manifest, which says that all artefacts are there."""
    final = work.final
    files.write_json(final / "report.json", report.to_json())
    artefacts = {}
    # A worker of a killed command may still be at its last file for a moment.
    for path in files.files_in(final):
        name = path.relative_to(final).as_posix()
        artefacts[name] = {"bytes": path.stat().st_size, "sha256": inputs.sha256_file(path)}
    extras = {n: artefacts.pop(n) for n in (TRAIN_HASHES, DROPPED) if n in artefacts}
    described = inputs.read_json(final / "domains.json")
    splits = {
        split: {
            name: sum(entry[name][split] for entry in described)
            for name in ("documents", "windows", "tokens")
        }
        for split in work.splits
    }
    for source in work.documents:
        shard = shards.load(source, "offsets", "split")
        size = np.bincount(shard["split"], np.diff(shard["offsets"]), len(work.splits))
        for split, num_bytes in zip(work.splits, size):
            splits[split]["bytes"] = splits[split].get("bytes", 0) + int(num_bytes)
    tokenizer = tokenizer_lib.load_tokenizer(final / "tokenizer.json")
    manifest = {
        "format": FORMAT_VERSION,
        "fingerprint": fingerprint_of({"artefacts": artefacts}),
        "seq_len": layout.seq_len,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": layout.eos_id,
        "tokenizer": tokenizer.hash,
        "embedder": load_embedder(final).name,
        "counts": totals
        | {"damaged": sum(report.counts.values()), "splits": splits, "unknown": _unknown(work)},
        "window_files": {
            split: [
                {"name": file.name, "windows": file.stop - file.start}
                for file in layout.files()
                if file.split == split
            ]
            for split in work.splits
        },
        "artefacts": artefacts,
        "extras": extras,  # of which the fingerprint says nothing
        "request": work.request,
    }
    files.write_json(final / "manifest.json", files.sealed(manifest))
