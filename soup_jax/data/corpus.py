"""A prepared corpus on disk, as readers see it: windows by domain, and what describes them.

Folder (`prepare` writes it, `open_corpus` reads it):

    windows/                 a TFDS data set of ArrayRecord files, readable without TensorFlow:
                             splits train, validation, held_out (those that have windows);
                             feature "tokens" [L + 1]
    offsets.safetensors      offsets/<split> int64 [K + 1], pad/<split> int64 [K]
    domains.json             K entries: label, terms, documents, windows and tokens per split
    levels.json              such entries of each coarser level, by its number of domains, if any
    centroids.safetensors    tensors of `domains.Tree`; similarity_quantiles float32 [3], and of
                             each coarser level similarity_quantiles/K_l
    tokenizer.json, embedder.json, embedder.safetensors
    train_hashes.safetensors hashes uint64 [n], sorted: of the train documents, by `short_hashes`
    dropped.json             near duplicates and contaminated documents, if they were looked for
    report.json              what was damaged in the sources, and where
    manifest.json            counts, parameters, sizes and SHA-256 of all of the above; comes last

`windows` writes the windows and says what is in one; this module reads.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from soup_jax import inputs, remote
from soup_jax import storage as files
from soup_jax.data import domain_map
from soup_jax.data.corpus_cache import CorpusCache, folder_of
from soup_jax.data.damage import REPORT, Report
from soup_jax.data.domain_map import DomainMap
from soup_jax.data.readers import short_hashes
from soup_jax.data.windows import token_dtype
from soup_jax.errors import UserError

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "held_out")
LEVELS = "levels.json"
# Not among what the fingerprint hashes; corpora of earlier versions have none.
TRAIN_HASHES = "train_hashes.safetensors"
# What every reader stands on; small, so that their hashes are compared whenever a corpus is opened.
_SMALL = ("offsets.safetensors", LEVELS, *domain_map.FILES)
_MANIFEST = {
    "format": int,
    "fingerprint": str,
    "seq_len": int,
    "vocab_size": int,
    "eos_id": int,
    "counts": {
        **dict.fromkeys(("documents", "duplicates", "too_short", "cut"), int),
        "unknown?": int,  # corpora of earlier versions do not say
        "splits": {...: {"documents": int}},
    },
    "window_files": {...: [{"name": str, "windows": int}]},
    "artefacts": {...: {"bytes": int, "sha256": str}},
    "extras?": {...: {"bytes": int, "sha256": str}},
    "request": {"parameters": dict, "sources": [{"path": str}]},
}
# Counts of a manifest whose corpus was cleaned, in words.
CLEANED = {"near_duplicates": "near duplicates", "contaminated": "in corpus.evaluation"}
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random reads
_READER_BUFFER = 4096  # bytes: about one record


class _Records:
    """The records of a split by number, from all its files; for any number of threads.

    ArrayRecord's own data source starts a thread for every file that a batch touches, and its read
    of a list of records passes over the index of the whole file. A range has neither cost.
    """

    def __init__(self, file: Callable[[str], pathlib.Path], window_files: Sequence[dict[str, Any]]):
        self._file = file
        self._names = [f"windows/{window_file['name']}" for window_file in window_files]
        self._ends = np.cumsum([file["windows"] for file in window_files])
        self._readers: dict[int, Any] = {}

    def read(self, ids: np.ndarray) -> list[bytes]:
        """The records with these numbers, in this order; UserError names a damaged file."""
        file = np.searchsorted(self._ends, ids, side="right")
        record = ids - np.concatenate([[0], self._ends])[file]
        return [self._record(f, i) for f, i in zip(file.tolist(), record.tolist())]

    def _record(self, file: int, record: int) -> bytes:
        try:
            return self._reader(file).read(record, record + 1)[0]
        except (IndexError, ValueError, RuntimeError, OSError) as e:
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise UserError(
                f"the corpus is damaged: {self._file(self._names[file])}, window {record}: "
                f"{reason}. Restore "
                "the file, or delete the corpus and prepare it again, which gives the same bytes"
            ) from e

    def _reader(self, file: int) -> Any:
        if file not in self._readers:
            from array_record.python import array_record_module

            reader = array_record_module.ArrayRecordReader(
                str(self._file(self._names[file])),
                _READER_OPTIONS,
                file_reader_buffer_size=_READER_BUFFER,
            )
            self._readers.setdefault(file, reader)  # another thread may have been faster
        return self._readers[file]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Corpus(DomainMap):
    """A prepared corpus; cheap to open, windows are read on demand by any number of threads."""

    manifest: dict[str, Any]
    seq_len: int  # L
    offsets: dict[str, np.ndarray]  # split -> int64 [K + 1], first record of each domain
    # Of the finest domains, whatever the level: their offsets, and filling targets in the last
    # window of each, int64 [K_finest].
    finest: dict[str, np.ndarray]
    pad: dict[str, np.ndarray]
    cache: CorpusCache | None = None  # of one in object storage; else all of it is in `path`
    _records: dict[str, _Records] = dataclasses.field(default_factory=dict, repr=False)

    def _file(self, name: str) -> pathlib.Path:
        if self.cache is None:
            return self.path / name
        return self.cache.file(name, artefacts_of(self.manifest)[name])

    @functools.cached_property
    def _train_hashes(self) -> np.ndarray | None:
        if TRAIN_HASHES not in artefacts_of(self.manifest):
            return None
        return inputs.read_tensors(self._file(TRAIN_HASHES))["hashes"]

    def trained_on(self, hashes: Sequence[bytes]) -> np.ndarray | None:
        """bool [n]: whether documents with these `text_hash`es are in the train split.

        None if the corpus does not know, as earlier versions of `prepare` kept no hashes.
        """
        if self._train_hashes is None:
            return None
        wanted = short_hashes(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16))
        left, right = (np.searchsorted(self._train_hashes, wanted, s) for s in ("left", "right"))
        return left < right

    def source(self, split: str) -> Any:
        """The TFDS data source of a split: `source[i]["tokens"]` is window i."""
        import tensorflow_datasets as tfds

        self._check_split(split)
        if self.offsets[split][-1] == 0:
            return ()
        for name in artefacts_of(self.manifest):
            if name.startswith("windows/"):
                self._file(name)
        return tfds.builder_from_directory(self.path / "windows").as_data_source(split)

    def read_windows(self, split: str, record_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """int32 [n, L + 1]: the windows with these record numbers, in this order.

        The same tokens as `source(split)` gives, without decoding an Example each: every record
        ends with the raw bytes of its tokens.

        Raises:
          ValueError: a record number outside [0, offsets[split][K]).
          UserError: a record is damaged.
        """
        ids = np.asarray(record_ids, dtype=np.int64)
        dtype = token_dtype(self.vocab_size)
        if ids.size == 0:
            return np.zeros((0, self.seq_len + 1), np.int32)
        self._check_split(split)
        num_records = self.offsets[split][-1]
        if ids.min() < 0 or ids.max() >= num_records:
            raise ValueError(f"{split!r} has no windows {ids}; num_records is {num_records}")
        if split not in self._records:
            records = _Records(self._file, self.manifest["window_files"][split])
            self._records.setdefault(split, records)  # another thread may have been faster
        data = np.frombuffer(b"".join(self._records[split].read(ids)), np.uint8)
        data = data.reshape(len(ids), -1)[:, -dtype.itemsize * (self.seq_len + 1) :]
        return np.ascontiguousarray(data).view(dtype).astype(np.int32)

    def num_targets(self, split: str, record_ids: np.ndarray) -> np.ndarray:
        """int32 [n]: targets of each window that are text; a finest domain's last has fewer."""
        finest = self.finest[split]
        domain = np.searchsorted(finest, record_ids, side="right") - 1
        pad = np.where(record_ids == finest[domain + 1] - 1, self.pad[split][domain], 0)
        return (self.seq_len - pad).astype(np.int32)

    def level(self, num_domains: int) -> "Corpus":
        """The same windows by the domains of a coarser level; ValueError if there is none.

        Its fingerprint is another: weights of these domains mean nothing to those.
        """
        tree = self.tree()
        begins = tree.ranges(tree.sizes.index(num_domains))
        described = inputs.read_json(self._file(LEVELS), {...: [{"label": str}]})
        offsets = {split: offsets[begins] for split, offsets in self.offsets.items()}
        windows_K = np.diff(offsets["train"])
        of_level = f"{self.fingerprint}/{num_domains}"
        return dataclasses.replace(
            self,
            domains=described[str(num_domains)],
            offsets=offsets,
            domain_frequencies=windows_K / windows_K.sum(),
            fingerprint=files.sha256_bytes(of_level.encode()),
        )

    def summary(self) -> list[str]:
        """Lines on what was read, dropped and damaged, and what came of it."""
        counts = self.manifest["counts"]
        lines = [
            f"{self.path}: {counts['documents']:,} documents read, {counts['duplicates']:,} "
            f"duplicates and {counts['too_short']:,} too short ones dropped, {counts['cut']:,} "
            f"long ones cut; {self.num_domains} domains, vocabulary of {self.vocab_size:,}, token "
            f"{self.eos_id} ends documents"
        ]
        found = [f"{counts[name]:,} {words}" for name, words in CLEANED.items() if name in counts]
        if found:
            lines.append(f"  found, and told in dropped.json: {', '.join(found)}")
        for split, count in counts["splits"].items():
            lines.append(
                f"  {split}: {count['documents']:,} documents, {count['bytes'] / 1e6:,.1f} MB, "
                f"{count['tokens']:,} tokens, {count['windows']:,} windows of {self.seq_len}"
            )
        if unknown := self.unknown():
            lines.append(f"  {unknown}")
        lines.append(f"  {self.balance()}")
        report = inputs.read_json(self._file("report.json"), REPORT)
        damage = Report(report).lines()
        lines.append(
            f"  damaged: {counts['damaged']}" + (" (all in report.json)" if damage else "")
        )
        return lines + [f"    {line}" for line in damage]

    def unknown(self, *, least: float = 0.0) -> str:
        """A sentence on the documents of which the embedder can say nothing; "" for no more than
        `least` of domain 0, in which they lie as every document must lie somewhere."""
        number = self.manifest["counts"].get("unknown", 0)
        total = sum(split["documents"] for split in self.manifest["counts"]["splits"].values())
        of_domain = number / max(sum(self.domains[0]["documents"].values()), 1)
        if not number or of_domain <= least:
            return ""
        return (
            f"{number:,} documents ({number / total:.1%}) have no word that the embedder knows: "
            f"they are {of_domain:.0%} of domain 0 ({self.label(0)})"
        )

    def verify(self) -> None:
        """Compare the SHA-256 of every artefact with the manifest; reads the whole folder.

        Raises:
          UserError: files that are missing or changed.
        """
        for name in artefacts_of(self.manifest):
            self._file(name)
        if changed := _changed(self.path, self.manifest):
            raise UserError(
                f"the corpus {self.path} is damaged: {', '.join(changed)} differ from its "
                "manifest. Delete the folder and run `soup-jax prepare` again"
            )

    def _check_split(self, split: str) -> None:
        if split not in self.offsets:
            raise UserError(
                f"the corpus {self.path} has no split {split!r}; it has {', '.join(self.offsets)}"
            )


def open_corpus(
    directory: str | os.PathLike, *, num_domains: int = 0, cache_dir: str = ""
) -> Corpus:
    """Open a prepared corpus and check that its files are there, with their sizes.

    Args:
      directory: its folder, or its gs:// or s3:// address.
      cache_dir: where files of one at an address are kept; default: in `storage.copies`.
      num_domains: of the level to open; default, and where there is no such level: the finest.

    Raises:
      UserError: not a corpus, an unfinished or incomplete one, or one of another version.
    """
    files.refuse_address(directory, "corpus.dir", objects=True)
    path, cache = pathlib.Path(directory), None
    advice = "run `soup-jax prepare` with this --config.corpus.dir"
    if remote.is_object(directory):
        address = remote.spelled(directory).rstrip("/")
        cache = CorpusCache(address, folder_of(address, cache_dir))
        path = cache.folder
    if not (cache.manifest() if cache else (path / "manifest.json").exists()):
        state = "is not finished" if (path / ".work").exists() else "is not a prepared corpus"
        where = cache.address if cache else path
        raise UserError(f"{where} {state} (it has no manifest.json): {advice}")
    manifest = _read_manifest(path)
    for name, artefact in artefacts_of(manifest).items():
        if cache and name in _SMALL:
            cache.file(name, artefact)
        if cache:  # the others are copied, and compared, when they are needed
            continue
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != artefact["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(
                f"the corpus {path} is damaged: {name} {found}, the manifest says "
                f"{artefact['bytes']} bytes. Delete the folder and {advice}"
            )
    if damaged := _changed(path, manifest, _SMALL):
        raise UserError(
            f"the corpus {path} is damaged: {', '.join(damaged)} changed since it was prepared. "
            f"Delete the folder and {advice}"
        )
    tensors = inputs.read_tensors(path / "offsets.safetensors")
    splits = [split for split in SPLITS if f"offsets/{split}" in tensors]
    offsets = {split: tensors[f"offsets/{split}"] for split in splits}
    windows_K = np.diff(offsets["train"])
    corpus = Corpus(
        path=path,
        manifest=manifest,
        domains=inputs.read_json(path / "domains.json", [{"label": str}]),
        seq_len=manifest["seq_len"],
        vocab_size=manifest["vocab_size"],
        eos_id=manifest["eos_id"],
        max_chars=manifest["request"]["parameters"].get("corpus.max_chars", 1 << 62),
        offsets=offsets,
        finest=offsets,
        pad={split: tensors[f"pad/{split}"] for split in splits},
        domain_frequencies=windows_K / windows_K.sum(),
        fingerprint=manifest["fingerprint"],
        cache=cache,
    )
    if num_domains in (0, corpus.num_domains) or num_domains not in corpus.tree().sizes:
        return corpus
    return corpus.level(num_domains)


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    where = path / "manifest.json"
    manifest = inputs.read_json(where)
    inputs.read_format(manifest, where, newest=FORMAT_VERSION)
    inputs.check_structure(manifest, _MANIFEST, where)
    inputs.check_seal(manifest, where)
    windows = (file["name"] for files_ in manifest["window_files"].values() for file in files_)
    for name in (*manifest["artefacts"], *windows):
        if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts:
            raise UserError(
                f"{where} was not written by soup_jax: it names {name!r}, not a file here"
            )
    # The fingerprint is the hash of these hashes; what a run and a recipe compare depends on it.
    if manifest["fingerprint"] != fingerprint_of(manifest):
        raise UserError(
            f"{where} was edited: its fingerprint is not that of the files it lists. Restore it, "
            "or delete the folder and prepare the corpus again"
        )
    return manifest


def artefacts_of(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a corpus but the manifest itself."""
    return manifest["artefacts"] | manifest.get("extras", {})


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """The fingerprint of the artefacts in a manifest: what the windows and the domains are, not
    where the text lay or what was wrong with it."""
    hashes = {name: a["sha256"] for name, a in manifest["artefacts"].items()}
    hashes.pop("report.json", None)
    return files.sha256_bytes(files.json_text(hashes).encode())


def _changed(
    path: pathlib.Path, manifest: Mapping[str, Any], names: Iterable[str] | None = None
) -> list[str]:
    """Artefacts (all, or those named) that are missing or whose SHA-256 is another."""
    artefacts = artefacts_of(manifest)
    return [
        name
        for name in (artefacts if names is None else artefacts.keys() & set(names))
        if not (path / name).is_file()
        or inputs.sha256_file(path / name) != artefacts[name]["sha256"]
    ]
