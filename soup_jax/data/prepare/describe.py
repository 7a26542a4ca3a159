"""The last stage of `prepare`: domains, hashes of train documents, damage and, last, manifest."""

from typing import Any

import numpy as np

from soup_jax import inputs
from soup_jax import storage as files
from soup_jax.data import domains, windows
from soup_jax.data import tokenizer as tokenizer_lib
from soup_jax.data.corpus import FORMAT_VERSION, TRAIN_HASHES, fingerprint_of
from soup_jax.data.damage import Report
from soup_jax.data.embed.base import load_embedder
from soup_jax.data.prepare import shards
from soup_jax.data.prepare.work import Work
from soup_jax.data.readers import short_hashes
from soup_jax.errors import UserError


def describe_domains(work: Work, layout: windows.Layout) -> None:
    """Write domains.json, and the centroids with the quantiles of similarity.

    Raises:
      UserError: a domain has no train documents.
    """
    if (work.final / "domains.json").exists():
        return
    cfg, similarity = work.cfg, []
    documents = np.zeros((len(work.splits), work.cfg.num_domains), np.int64)
    for source, path in zip(work.shards("documents"), work.shards("grouped")):
        grouped = shards.load(path, "documents", "similarity")
        documents = documents + grouped["documents"].reshape(len(work.splits), -1)
        similarity.append(grouped["similarity"][shards.load(source, "split")["split"] == 0])
    quantiles = np.quantile(np.concatenate(similarity), domains.QUANTILES).astype(np.float32)
    centroids = shards.load(work.path / "centroids.safetensors")["centroids"]
    tensors = {"centroids": centroids, "similarity_quantiles": quantiles}
    shards.save(work.final / "centroids.safetensors", tensors)
    rows = shards.choose(work.shards("documents"), num_documents=cfg.embed.fit_documents)
    texts = list(shards.chosen_texts(work.shards("documents"), rows, domains.LABEL_CHARS))
    nearest = shards.chosen_rows(work.shards("grouped"), rows, "nearest")
    described = []
    for k, terms in enumerate(domains.top_terms(texts, nearest, cfg.num_domains)):
        label = " ".join(terms[:3]) or f"domain {k}"
        entry: dict[str, Any] = {"domain": k, "label": label, "terms": terms}
        entry |= {name: {} for name in ("documents", "windows", "tokens")}
        for i, split in enumerate(work.splits):
            num_windows = int(np.diff(layout.offsets[split])[k])
            entry["documents"][split] = int(documents[i, k])
            entry["windows"][split] = num_windows
            entry["tokens"][split] = num_windows * layout.seq_len - int(layout.pad[split][k])
        described.append(entry)
    empty = [entry["domain"] for entry in described if not entry["windows"]["train"]]
    if empty:
        raise UserError(f"domains {empty} have no train documents: lower --config.num_domains")
    files.write_json(work.final / "domains.json", described)


def write_train_hashes(work: Work) -> None:
    """Write train_hashes.safetensors, by which other text is compared with the train documents."""
    path = work.final / TRAIN_HASHES
    if path.exists():
        return
    parts = []
    for source in work.shards("documents"):
        shard = shards.load(source, "split", "hash")
        parts.append(short_hashes(shard["hash"][shard["split"] == 0]))
    shards.save(path, {"hashes": np.unique(np.concatenate(parts))})


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
    extras = {TRAIN_HASHES: artefacts.pop(TRAIN_HASHES)}
    described = inputs.read_json(final / "domains.json")
    splits = {
        split: {
            name: sum(entry[name][split] for entry in described)
            for name in ("documents", "windows", "tokens")
        }
        for split in work.splits
    }
    for source in work.shards("documents"):
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
        "counts": totals | {"damaged": sum(report.counts.values()), "splits": splits},
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
