"""What a corpus is made from: the settings and sources that determine it, and how two differ.

`prepare` records this in the manifest, recognises a finished folder by it and explains a refusal
with it. Settings that change no byte, such as the number of workers, are not part of it.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from soup_jax import inputs
from soup_jax.config import schema as config_lib
from soup_jax.data import sources as corpus_lib
from soup_jax.data import tokenizer as tokenizer_lib
from soup_jax.data.corpus import FORMAT_VERSION, Corpus
from soup_jax.data.damage import Report
from soup_jax.data.embed.base import EMBEDDERS
from soup_jax.errors import UnavailableError, UserError

_MOST_SOURCES = 1_000_000
_RECORDED_IF_SET = ("corpus.domain_field", "corpus.near_duplicates")
# What `make_request` returns, as it stands in files.
REQUEST = {
    "format": int,
    "parameters": dict,
    "sources": [{"path": str}],
}


def make_request(
    cfg: Any,
    sources: Iterable[corpus_lib.SourceFile],
    *,
    known: Iterable[Mapping[str, Any]] = (),
    hashed: bool = True,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """What determines a corpus: every parameter that matters and the hash of every source.

    Args:
      known: sources of an earlier request. A file that has the size and the time of its last change
        that it had then has the hash that it had then, and is not read.
      hashed: False leaves the hashes of the others out.
      progress: passes on the files that are read, and shows how many.
    """
    tokenizer = {"train_bytes": cfg.tokenizer.train_bytes}
    if cfg.tokenizer.path:
        tokenizer = {"hash": tokenizer_lib.load_tokenizer(cfg.tokenizer.path).hash}
    names = ("text_field", "validation_fraction", "held_out_fraction", "min_chars", "max_chars")
    parameters = {name: getattr(cfg, name) for name in ("num_domains", "vocab_size", "seq_len")}
    parameters |= {f"corpus.{name}": getattr(cfg.corpus, name) for name in names}
    if cfg.corpus.near_duplicates or cfg.corpus.evaluation:
        parameters["corpus.near_duplicates"] = cfg.corpus.near_duplicates
        parameters["corpus.contaminated"] = cfg.corpus.contaminated
        parameters["corpus.evaluation_text_field"] = cfg.corpus.evaluation_text_field
        paths = cfg.corpus.evaluation
        scored = corpus_lib.find_files(paths, Report()) if paths else []
        parameters["evaluation"] = [inputs.sha256_file(source.path) for source in scored]
    if cfg.corpus.domain_field:
        parameters["corpus.domain_field"] = cfg.corpus.domain_field
    parameters["corpus.levels"] = list(cfg.corpus.levels)
    parameters |= {f"tokenizer.{name}": value for name, value in tokenizer.items()}
    embed = dict(cfg.embed.items())
    if hasattr(embedder := EMBEDDERS.get(cfg.embed.kind), "source_hash"):
        del embed["path"]  # weights are the same wherever they lie
        embed["weights"] = embedder.source_hash(cfg.embed)
    parameters |= {f"embed.{name}": value for name, value in embed.items()}
    before = {entry["path"]: entry for entry in known}
    found = [_stamp(source) for source in sources]
    if len(found) > _MOST_SOURCES:
        raise UserError(
            f"{len(found):,} source files, and {_MOST_SOURCES:,} are the most: join them into "
            "files of JSON lines, many documents each"
        )
    changed = []
    for entry in found:
        old = before.get(entry["path"], {})
        same = len(entry) == 3 and entry == {name: old.get(name) for name in entry}
        if same and old.get("sha256"):
            entry["sha256"] = old["sha256"]
        else:
            changed.append(entry)
    for entry in progress(changed) if changed and hashed else ():
        entry["sha256"] = hash_of(entry["path"])
    return {"format": FORMAT_VERSION, "parameters": parameters, "sources": found}


def hash_of(path: str) -> str | None:
    """SHA-256 of a source; None if it cannot be read, which reading will report.

    Raises:
      UnavailableError: its storage cannot be reached.
    """
    try:
        return inputs.sha256_file(path)
    except UnavailableError:
        raise
    except UserError:
        return None


def _stamp(source: corpus_lib.SourceFile) -> dict[str, Any]:
    # Three entries for what is there, by which it is known again.
    if source.tag:
        return {"path": source.path, "bytes": source.size, "tag": source.tag}
    try:
        status = os.stat(source.path)
    except OSError:
        return {"path": source.path}
    return {"path": source.path, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """In words, one each: what `new` asks for that `old` did not; empty for the same corpus."""
    result = []
    # What an earlier version did not record is what held then.
    parameters = config_lib.translated(old["parameters"])
    for name in sorted(parameters | new["parameters"]):
        before, now = (_value(found, name) for found in (parameters, new["parameters"]))
        if before != now:
            result.append(f"{name}: {before}, now {now}")
    # Before they are hashed, what is known of a source is its size and time.
    hashed = all("sha256" in source for source in [*old["sources"], *new["sources"]])
    before, now = (
        {s["path"]: s["sha256"] if hashed else _known(s) for s in sources}
        for sources in (old["sources"], new["sources"])
    )
    # The same contents in the same order are the same corpus, wherever they lie.
    if list(before.values()) != list(now.values()):
        gone, added = sorted(before.keys() - now.keys()), sorted(now.keys() - before.keys())
        changed = [path for path in before if path in now and before[path] != now[path]]
        for what, paths in (("removed", gone), ("added", added), ("changed", changed)):
            if paths:
                more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
                result.append(f"sources {what}: {', '.join(paths[:3])}{more}")
        if not (gone or added or changed):
            result.append("sources: in another order")
    return result


def _known(source: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(source.get(name) for name in ("bytes", "mtime_ns", "tag"))


def _value(found: Mapping[str, Any], name: str) -> Any:
    field = config_lib.FIELDS.get(name)
    if field is None:
        return found.get(name, [] if name == "evaluation" else None)
    return field.from_json(found.get(name, field.old))


def check_against(cfg: Any, corpus: Corpus) -> list[str]:
    """Refuse fields of a training's config that say what its corpus is not; returns warnings.

    Fields at their default say nothing: a training need not repeat how its corpus was prepared.

    Raises:
      UserError: lists each, with the value that the corpus was prepared with.
    """
    made = corpus.manifest["request"]["parameters"]
    asked = {f"corpus.{name}": value for name, value in cfg.corpus.items()}
    asked |= {f"embed.{name}": value for name, value in cfg.embed.items()}
    asked |= {"tokenizer.train_bytes": cfg.tokenizer.train_bytes}
    differ = [
        f"{name} = {value!r}, prepared with {_value(made, name)!r}"
        for name, value in asked.items()
        if (name in made or name in _RECORDED_IF_SET)
        and value not in (_value(made, name), config_lib.FIELDS[name].default)
    ]
    if cfg.tokenizer.path:
        found = tokenizer_lib.load_tokenizer(cfg.tokenizer.path).hash
        if found != corpus.manifest.get("tokenizer", found):
            differ.append(f"tokenizer.path = {cfg.tokenizer.path!r}, prepared with another one")
    if (reset := cfg.model.attention_reset) not in (-1, corpus.eos_id):
        differ.append(f"model.attention_reset = {reset}, documents end with {corpus.eos_id}")
    if differ:
        raise UserError(
            f"the corpus {corpus.path} is not what the config says: {'; '.join(differ)}. Set them "
            "as they were, or prepare another corpus"
        )
    if cfg.vocab_size <= corpus.vocab_size:
        return []
    return [
        f"vocab_size = {cfg.vocab_size}, but the tokenizer has {corpus.vocab_size} tokens: the "
        "rest of the model's vocabulary is never used"
    ]


def check_weights(path: str, corpus: Corpus) -> None:
    """Refuse domain weights of a recipe that was made on another corpus; "" is no file.

    Raises:
      UserError: its weights belong to other domains.
    """
    recipe = inputs.read_json(path) if path else None
    if not isinstance(recipe, dict):
        return
    hashes = recipe.get("hashes")
    theirs = hashes.get("corpus") if isinstance(hashes, dict) else None
    if theirs not in (None, corpus.fingerprint):
        raise UserError(
            f"domain_weights.path = {path} is the recipe of a specialist on another corpus "
            f"({str(theirs)[:12]}, here {corpus.fingerprint[:12]}): its weights mean other domains"
        )


def check(cfg: Any) -> None:
    """Refuse settings that cannot work, before anything is read.

    Raises:
      UserError: no document can have an allowed length, there is no such embedder, or the
        vocabulary does not fit the tokenizer, or the sample the domains.
    """
    config_lib.check_lengths(cfg)
    if hasattr(embedder := EMBEDDERS.get(cfg.embed.kind), "check"):
        embedder.check(cfg.embed)
    if cfg.tokenizer.path:
        size = tokenizer_lib.load_tokenizer(cfg.tokenizer.path).vocab_size
        if size > cfg.vocab_size:
            raise UserError(
                f"the tokenizer {cfg.tokenizer.path} has {size} tokens, more than vocab_size = "
                f"{cfg.vocab_size}: set --config.vocab_size={size} or more"
            )
    elif cfg.vocab_size < tokenizer_lib.MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {cfg.vocab_size}; the byte-level tokenizer that is trained needs at "
            f"least {tokenizer_lib.MIN_VOCAB_SIZE}"
        )
    sizes = (*cfg.corpus.levels, cfg.num_domains)
    whole = all(type(size) is int and size > 0 for size in sizes)
    if not whole or list(sizes) != sorted(set(sizes)):
        raise UserError(
            f"corpus.levels = {cfg.corpus.levels!r} must be ascending numbers of domains below "
            f"num_domains = {cfg.num_domains}"
        )
    if cfg.corpus.domain_field:
        if cfg.corpus.levels:
            raise UserError(
                f"corpus.levels = {cfg.corpus.levels!r} cuts domains by k-means, and "
                f"corpus.domain_field = {cfg.corpus.domain_field!r} names them: set one of both"
            )
    elif cfg.num_domains > cfg.embed.fit_documents:
        raise UserError(
            f"num_domains is {cfg.num_domains}, but k-means sees only embed.fit_documents = "
            f"{cfg.embed.fit_documents} documents: raise --config.embed.fit_documents, best to "
            "some 50 per domain"
        )


def check_fields(sources: Iterable[corpus_lib.SourceFile], domain_field: str) -> None:
    """Refuse sources whose documents can name no domain, if they are to; "" asks for none.

    Raises:
      UserError: one is a text file.
    """
    for source in sources:
        if domain_field and source.kind == "text":
            raise UserError(
                f"{source.path} is a text, which has no field {domain_field!r}: with "
                "corpus.domain_field, sources are .jsonl or .parquet"
            )
