"""Prepare a corpus: source files to token windows grouped by domain, in one restartable command.

0. sources    -> their hashes      groups of files in parallel
1. sources    -> document shards   read, check, split (prepare/shards.py); groups in parallel
   shards     -> those that stay   without duplicates (prepare/clean.py); shards in parallel
2. shards     -> tokenizer.json    BPE on train documents chosen by hash, or a given file
3. shards     -> embedder          fitted on train documents chosen by hash
4. shard      -> token ids + unit vectors per document; shards in parallel
5. vectors    -> centroids         k-means on the documents of 3, or the mean of each given domain
6. shard      -> token ids sorted by split and domain, document order kept; shards in parallel
7. all shards -> windows/          ArrayRecord files; files in parallel (data/windows.py)
8.            -> domains.json, train_hashes.safetensors, report.json and, last, manifest.json;
                 timings.json, of which the manifest says nothing

A shard is 4,096 documents or 32 MB of text. Every output is a function of the config and of the
sources' bytes alone, on one kind of CPU with one BLAS, not of the number of workers; the manifest
also says where the sources lay and when they were changed. It is written atomically under
`<dir>/.work`: a command that was killed continues after the last finished output and ends with the
same bytes.

Every stage is jobs, each with a file that says that it is done; so several processes can share the
work (`Part`), in rounds: what one process must do alone waits until all jobs before it are done.

Memory: a few shards per worker; one window file (windows.FILE_BYTES) per worker; the texts of 3,
`embed.fit_documents` times at most `embed.max_chars`; and what `clean` needs. Disk, until it is
done: the text once, its tokens twice.

This is not the place for filtering by quality or languages: bring documents that should be trained
on.
"""

import os
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from soup_jax import inputs, remote
from soup_jax import storage as files
from soup_jax.data import domain_report, domains, windows
from soup_jax.data import sources as corpus_lib
from soup_jax.data import tokenizer as tokenizer_lib
from soup_jax.data.corpus import Corpus, artefacts_of, open_corpus
from soup_jax.data.corpus_cache import CorpusCache, folder_of, upload
from soup_jax.data.damage import Report
from soup_jax.data.embed.base import EMBEDDERS, save_embedder
from soup_jax.data.prepare import enough, shards
from soup_jax.data.prepare import provenance as request_lib
from soup_jax.data.prepare import work as work_lib
from soup_jax.data.prepare.clean import clean, sign
from soup_jax.data.prepare.describe import describe_domains, write_manifest, write_train_hashes
from soup_jax.data.prepare.given import given_centroids
from soup_jax.data.prepare.start import finished, least_bytes, start, write_request
from soup_jax.data.prepare.work import Job, Map, Part, Waiting, Work, alone, progress, run_jobs, say
from soup_jax.errors import UserError

# With fewer to fit a centroid on, k-means warns in the libraries of the field.
_DOCUMENTS_PER_DOMAIN = 39
# A share of domain 0 that changes what the domain is.
_UNKNOWN = 0.1


def prepare(cfg: Any, *, map: Map | None = None) -> Corpus:
    """Prepare `cfg.corpus.dir` from `cfg.corpus.sources`; the finished folder is left alone.

    Args:
      map: calls a stage's function with the arguments of each of its jobs, as `parallel_map` does.

    Raises:
      UserError: sources or settings that cannot work, such as too few documents or windows that
        would be padding for the most part, or a folder made with other settings.
    """
    corpus = prepare_part(cfg, Part(), map=map)
    assert corpus is not None
    return corpus


def prepare_part(cfg: Any, part: Part, *, map: Map | None = None) -> Corpus | None:
    """The part's share of `prepare`, as far as others have done theirs; the corpus at its end.

    Parts share the folder. Those that do not merge may work at the same time.

    Raises:
      UserError: as `prepare`.
    """
    begin = time.monotonic()
    request_lib.check(cfg)
    place = cfg.corpus.dir
    cache = None
    directory = pathlib.Path(place)
    if remote.is_object(place):
        if not part.whole:
            raise UserError(
                f"--config.corpus.dir={place} is an address: shards need a disk that they share"
            )
        cache = CorpusCache(place.rstrip("/"), folder_of(place, cfg.corpus.cache_dir))
        directory = cache.folder
    report = Report()
    sources = corpus_lib.find_files(cfg.corpus.sources, report)
    if cache.manifest() if cache else (directory / "manifest.json").exists():
        return finished(cfg, open_corpus(place, cache_dir=cfg.corpus.cache_dir), sources)
    if cache:
        remote.check_writable(place, "--config.corpus.dir")
        cache.forget()
    if (directory / "manifest.json").exists():  # and was not copied to its address
        finished(cfg, open_corpus(directory), sources)
    elif not _prepare(cfg, directory, sources, part, map, report):
        return None
    if cache:
        say(f"copying it to {place}")
        upload(directory, cache.address, artefacts_of(open_corpus(directory).manifest))
    corpus = open_corpus(place, cache_dir=cfg.corpus.cache_dir)
    print("\n".join(corpus.summary()))
    if warning := corpus.unknown(least=_UNKNOWN):
        say(
            f"warning: {warning}, and what is drawn for it is not what its label says. Leave them "
            "out of the sources, or take another --config.embed.kind"
        )
    if warning := domain_report.repetition_warning(cfg, corpus):
        say(f"warning: {warning}")
    say(f"done in {time.monotonic() - begin:.0f} s")
    return corpus


def _prepare(
    cfg: Any,
    directory: pathlib.Path,
    sources: Sequence[corpus_lib.SourceFile],
    part: Part,
    map: Map | None,
    report: Report,
) -> bool:
    # On a file system; whether it is done.
    files.check_folder_target(directory, "--config.corpus.dir")
    if not (directory / ".work" / "request.json").exists():  # else it holds some of that already
        files.check_room(directory, least_bytes(sources), f"preparing the corpus {directory}")
    directory.mkdir(parents=True, exist_ok=True)
    busy = f"another `soup-jax prepare` is at work in {directory}"
    try:
        with files.locked(directory, busy, shared=not part.merges):
            work = start(cfg, directory, sources, part, map)
            # The manifest among the staged artefacts says that all of them are there; after that,
            # moving them is all that is left, whenever a kill comes.
            if not (work.final / "manifest.json").exists():
                _stages(work, report)
            alone(work, "moving the corpus to its place")
            _publish(work)
    except Waiting as e:
        say(f"done so far: {e}")
        return False
    return True


def _stages(work: Work, report: Report) -> None:
    with work_lib.timed(work, "hashing the sources"):
        _hash(work)
    with work_lib.timed(work, "reading and cleaning"):
        totals = _read(work, report)
    with work_lib.timed(work, "training the tokenizer"):
        _fit_tokenizer(work)
    with work_lib.timed(work, "fitting the embedder"):
        _fit_embedder(work)
    with work_lib.timed(work, "tokenising and embedding"):
        _encode(work)
    with work_lib.timed(work, "fitting the centroids"):
        _fit_centroids(work)
    with work_lib.timed(work, "grouping by domain"):
        _group(work)
    with work_lib.timed(work, "writing windows"):
        layout = _write_windows(work)
    with work_lib.timed(work, "describing the corpus"):
        describe_domains(work, layout)
        write_train_hashes(work)
        write_manifest(work, layout, totals, report)


# Stage 0


def _hash(work: Work) -> None:
    """Fill in the hashes of the sources."""
    sources = work.request["sources"]
    if all("sha256" in source for source in sources):
        return
    jobs = []
    for i, group in enumerate(shards.groups(work.sources)):
        target = work.path / "hashes" / f"{i:06d}.json"
        jobs.append(Job((group, target), (target,)))
    # Parts read on meanwhile; only the manifest needs the hashes.
    if run_jobs(work, shards.hash_files, jobs, "hashing the sources", wait=work.part.merges):
        return
    hashes = [sha256 for job in jobs for sha256 in inputs.read_json(job.outputs[0])]
    for source, sha256 in zip(sources, hashes, strict=True):
        source["sha256"] = sha256
    if work.part.merges:
        write_request(work.path, work.request)


# Stage 1


def _read(work: Work, report: Report) -> dict[str, int]:
    cfg, folder = work.cfg.corpus, work.path / "documents"
    request_lib.check_fields(work.sources, cfg.domain_field)
    reading = shards.Reading(
        text_field=cfg.text_field,
        domain_field=cfg.domain_field,
        min_chars=cfg.min_chars,
        max_chars=cfg.max_chars,
        validation_fraction=cfg.validation_fraction,
        held_out_fraction=cfg.held_out_fraction,
        splits=work.splits,
    )
    jobs = [
        Job((folder, i, group, reading), (folder / f"{i:06d}.json",))
        for i, group in enumerate(shards.groups(work.sources))
    ]
    say(
        f"{len(jobs):,} groups of source files; as many files, or some more, at a time between the "
        "stages, whatever num_domains is"
    )
    left = run_jobs(work, shards.read_group, jobs, "reading documents", wait=work.part.merges)
    sign(work)
    if left:
        raise Waiting(left)
    totals: dict[str, int] = {}
    for job in jobs:
        state = inputs.read_json(job.outputs[0], {"counts": {...: int}, "report": dict})
        report.merge(Report(state["report"]))
        for name, count in state["counts"].items():
            totals[name] = totals.get(name, 0) + count
    totals |= clean(work)
    if work.part.merges:
        enough.check(work, totals, report)
    return totals


# Stages 2, 3 and 5: what is fitted on a sample


def _fit_tokenizer(work: Work) -> None:
    path = work.final / "tokenizer.json"
    if path.exists():
        return
    alone(work, "training the tokenizer")
    cfg = work.cfg
    if cfg.tokenizer.path:
        tokenizer = tokenizer_lib.load_tokenizer(cfg.tokenizer.path)
        say(f"took the tokenizer {cfg.tokenizer.path}: {tokenizer.vocab_size} tokens")
    else:
        documents = work.documents
        rows = shards.choose(documents, num_bytes=cfg.tokenizer.train_bytes)
        texts = progress(shards.chosen_texts(documents, rows), "training the tokenizer")
        tokenizer = tokenizer_lib.train_tokenizer(texts, cfg.vocab_size)
        if tokenizer.vocab_size < cfg.vocab_size:
            say(
                f"the text gives only {tokenizer.vocab_size} tokens, not vocab_size = "
                f"{cfg.vocab_size}; the rest of the model's vocabulary will be unused"
            )
    tokenizer.save(path)


def _fit_embedder(work: Work) -> None:
    if (work.final / "embedder.json").exists():
        return
    alone(work, "fitting the embedder")
    cfg = work.cfg.embed
    documents = work.documents
    rows = shards.choose(documents, num_documents=cfg.fit_documents)
    kind = EMBEDDERS.get(cfg.kind)
    texts = progress(shards.chosen_texts(documents, rows, cfg.max_chars), "fitting the embedder")
    sample = list(texts) if getattr(kind, "learns", True) else []
    embedder = kind.fit(cfg, sample, num_workers=work.num_workers)
    save_embedder(embedder, work.final, kind=cfg.kind)


def _fit_centroids(work: Work) -> None:
    path = work.path / "centroids.safetensors"
    if path.exists():
        return
    alone(work, "fitting the centroids")
    cfg = work.cfg
    if cfg.corpus.domain_field:
        shards.save(path, given_centroids(work))
        return
    rows = shards.choose(work.documents, num_documents=cfg.embed.fit_documents)
    embeddings = shards.chosen_rows(work.shards("encoded"), rows, "embeddings")
    levels = domains.level_sizes(cfg.num_domains, cfg.corpus.levels)
    say(
        f"cutting the corpus into {' and these into '.join(map(str, (*levels, cfg.num_domains)))} "
        f"domains by k-means on {len(embeddings):,} documents, "
        f"{len(embeddings) / cfg.num_domains:.0f} a domain"
    )
    if len(embeddings) < _DOCUMENTS_PER_DOMAIN * cfg.num_domains:
        say(
            f"fewer than {_DOCUMENTS_PER_DOMAIN} documents a domain make poor centroids: raise "
            "--config.embed.fit_documents, add sources or lower --config.num_domains"
        )
    shards.save(path, domains.fit_tree(embeddings, cfg.num_domains, levels).tensors())


# Stages 4 and 6: one shard each


def _encode(work: Work) -> None:
    version = inputs.sha256_file(work.final / "tokenizer.json")
    version += inputs.sha256_file(work.final / "embedder.json")
    both = zip(work.documents, work.shards("encoded"), work.shards("grouped"))
    jobs = [Job((a, b, work.final, version), (b, later)) for a, b, later in both]
    run_jobs(work, shards.encode_shard, jobs, "tokenising and embedding")


def _group(work: Work) -> None:
    centroids, num_splits = work.path / "centroids.safetensors", len(work.splits)
    both = zip(work.documents, work.shards("encoded"), work.shards("grouped"))
    jobs = [Job((a, b, c, centroids, num_splits), (c,)) for a, b, c in both]
    run_jobs(work, shards.group_shard, jobs, "grouping by domain")


# Stage 7


def _write_windows(work: Work) -> windows.Layout:
    grouped = work.shards("grouped")
    starts = sum(shards.load(path, "starts")["starts"] for path in grouped)
    num_tokens = np.diff(starts).reshape(len(work.splits), -1)
    tokenizer = tokenizer_lib.load_tokenizer(work.final / "tokenizer.json")
    layout = windows.Layout.of(
        dict(zip(work.splits, num_tokens)),
        seq_len=work.cfg.seq_len,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )
    num_targets = int(layout.offsets["train"][-1]) * work.cfg.seq_len
    enough.check_padding(work.cfg, int(num_tokens[0].sum()), num_targets)
    directory = work.final / "windows"
    directory.mkdir(parents=True, exist_ok=True)
    plan = work.path / "layout.safetensors"  # else every job would carry all of this
    shards.save_layout(plan, layout, grouped)
    jobs = [Job((directory, file, plan), (directory / file.name,)) for file in layout.files()]
    run_jobs(work, shards.write_window_file, jobs, "writing windows")
    alone(work, "describing the corpus")
    windows.write_metadata(directory, layout)
    shards.save(work.final / "offsets.safetensors", layout.tensors())
    return layout


def _publish(work: Work) -> None:
    """Move the artefacts to their place, the manifest last; remove the rest."""
    say(work_lib.write_timings(work))
    for left in work.final.rglob(".*.tmp"):  # of a worker that outlived a killed command a moment
        left.unlink(missing_ok=True)
    for path in sorted(work.final.iterdir(), key=lambda path: path.name == "manifest.json"):
        target = work.directory / path.name
        if target.is_dir():  # of a run with other settings that was killed while it moved things
            shutil.rmtree(target)
        os.replace(path, target)
    shutil.rmtree(work.path)
