"""A prepared corpus on disk: windows grouped by domain, and everything that describes them.

Folder (`prepare` writes it, `open_corpus` reads it):

    windows/                 a TFDS data set of ArrayRecord files, readable without TensorFlow:
                             splits train, validation, held_out (those that have windows);
                             feature "tokens" [L + 1]
    offsets.safetensors      offsets/<split> int64 [K + 1], pad/<split> int64 [K]
    domains.json             K entries: label, terms, documents, windows and tokens per split
    centroids.safetensors    centroids float32 [K, dim], similarity_quantiles float32 [3]
    tokenizer.json, embedder.json, embedder.safetensors
    report.json              what was damaged in the sources, and where
    manifest.json            counts, parameters, sizes and SHA-256 of all of the above; comes last

Window j of domain k in a split is record `offsets[k] + j`. The stream of a domain is EOS, then its
documents in corpus order, each with EOS after it; window j holds tokens [j * L, j * L + L] of the
stream, so neighbours share one token and *every* token but the leading EOS is a target exactly
once. The last window is filled up with EOS; `pad[k]` of its L targets are filling.

`prepare` makes the documents; this module packs, writes and reads them.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from soup_jax import storage as files
from soup_jax.data import domains
from soup_jax.data import sources as corpus
from soup_jax.data import tokenizer as tokenizer_lib
from soup_jax.data.embed.base import Embedder, load_embedder
from soup_jax.errors import UserError

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "held_out")
DATASET = "windows"
# Raw bytes of windows in one ArrayRecord file: large enough that a read of a few hundred windows
# opens few files, small enough to hold in memory while it is written.
FILE_BYTES = 128 << 20
# One record per chunk, so that a random read decompresses nothing but its record.
_WRITER_OPTIONS = "group_size:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random reads
_READER_BUFFER = 4096  # bytes: about one record


def token_dtype(vocab_size: int) -> np.dtype:
    """The storage type of token ids: uint16 where it fits, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclasses.dataclass(frozen=True)
class WindowFile:
    """One ArrayRecord file to write: records [start, stop) of a split."""

    split: str
    name: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where windows go: a pure function of the number of stream tokens per split and domain."""

    seq_len: int
    dtype: np.dtype
    eos_id: int
    offsets: dict[str, np.ndarray]  # int64 [K + 1]
    pad: dict[str, np.ndarray]  # int64 [K]

    @classmethod
    def of(
        cls, num_tokens: dict[str, np.ndarray], *, seq_len: int, vocab_size: int, eos_id: int
    ) -> "Layout":
        """`num_tokens[split][k]` counts tokens with their EOS, without the leading EOS."""
        offsets, pad = {}, {}
        for split, tokens in num_tokens.items():
            windows = -(-tokens // seq_len)
            offsets[split] = np.concatenate([[0], np.cumsum(windows)]).astype(np.int64)
            pad[split] = (windows * seq_len - tokens).astype(np.int64)
        return cls(seq_len, token_dtype(vocab_size), eos_id, offsets, pad)

    def files(self) -> list[WindowFile]:
        """The files of all splits; a split without windows has none (TFDS cannot open it)."""
        result = []
        per_file = max(1, FILE_BYTES // (self.dtype.itemsize * (self.seq_len + 1)))
        for split, offsets in self.offsets.items():
            total = int(offsets[-1])
            count = -(-total // per_file)
            for i in range(count):
                # Equal files rather than full ones and a small rest.
                start, stop = total * i // count, total * (i + 1) // count
                name = f"{DATASET}-{split}.array_record-{i:05d}-of-{count:05d}"
                result.append(WindowFile(split, name, start, stop))
        return result


def write_window_file(
    directory: pathlib.Path, file: WindowFile, layout: Layout, grouped: Sequence[pathlib.Path]
) -> None:
    """Write one ArrayRecord file from the grouped token shards (see `read_streams`)."""
    from array_record.python import array_record_module

    length = layout.seq_len
    offsets = layout.offsets[file.split]
    first = int(np.searchsorted(offsets, file.start, side="right")) - 1
    last = int(np.searchsorted(offsets, file.stop, side="left"))
    # Windows [low, high) of each of the domains first .. last - 1 lie in this file.
    low = np.maximum(offsets[first:last], file.start) - offsets[first:last]
    high = np.minimum(offsets[first + 1 : last + 1], file.stop) - offsets[first:last]
    streams = read_streams(
        grouped, layout, file.split, first, begin=low * length, end=high * length + 1
    )
    prefix = record_prefix(length, layout.dtype)
    with files.atomic_path(directory / file.name) as path:
        writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        for stream in streams:
            for start in range(0, len(stream) - 1, length):
                writer.write(prefix + stream[start : start + length + 1].tobytes())
        writer.close()


def read_streams(
    grouped: Sequence[pathlib.Path],
    layout: Layout,
    split: str,
    first: int,
    *,
    begin: np.ndarray,
    end: np.ndarray,
) -> list[np.ndarray]:
    """Tokens [begin[i], end[i]) of the stream of domain first + i, filled up with EOS.

    A grouped shard holds the `tokens` of its documents sorted by split, then domain, and `starts`
    int64 [splits * K + 1]: what is needed of it is one contiguous piece, so every shard is opened
    once and memory holds the result and that piece.
    """
    streams = [np.full(size, layout.eos_id, layout.dtype) for size in end - begin]
    row = list(layout.offsets).index(split) * (len(layout.offsets[split]) - 1) + first
    position = np.ones(len(streams), np.int64)  # of the next token; the leading EOS is at 0
    for path in grouped:
        with safetensors.safe_open(path, "numpy") as shard:
            starts = shard.get_slice("starts")[row : row + len(streams) + 1]
            # Of this shard's piece of each stream, the part [a, b) that was asked for.
            size = np.diff(starts)
            a = np.clip(begin - position, 0, size)
            b = np.clip(end - position, 0, size)
            used = np.flatnonzero(b > a)
            if len(used):
                base = int(starts[used[0]] + a[used[0]])
                stop = int(starts[used[-1]] + b[used[-1]])
                piece = shard.get_slice("tokens")[base:stop]
                for i in used:
                    source = slice(starts[i] + a[i] - base, starts[i] + b[i] - base)
                    target = position[i] + a[i] - begin[i]
                    streams[i][target : target + b[i] - a[i]] = piece[source]
            position += size
    return streams


@functools.cache
def record_prefix(seq_len: int, dtype: np.dtype) -> bytes:
    """What a serialised tf.train.Example of one window holds before its raw token bytes."""
    from tensorflow_datasets.core import example_serializer

    features = _features(seq_len, dtype)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    window = np.zeros(seq_len + 1, dtype)
    record = serializer.serialize_example(features.encode_example({"tokens": window}))
    assert record.endswith(window.tobytes())
    return record[: -window.nbytes]


def _features(seq_len: int, dtype: np.dtype) -> Any:
    import tensorflow_datasets as tfds

    tokens = tfds.features.Tensor(shape=(seq_len + 1,), dtype=dtype.type, encoding="bytes")
    return tfds.features.FeaturesDict({"tokens": tokens})


def write_metadata(directory: pathlib.Path, layout: Layout) -> None:
    """Write `dataset_info.json` and `features.json`: the folder becomes a TFDS data set."""
    import tensorflow_datasets as tfds

    record_bytes = (layout.seq_len + 1) * layout.dtype.itemsize
    infos = []
    for split, window_files in itertools.groupby(layout.files(), key=lambda file: file.split):
        lengths = [file.stop - file.start for file in window_files]
        template = tfds.core.ShardedFileTemplate(
            dataset_name=DATASET, data_dir=directory, split=split, filetype_suffix="array_record"
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=lengths,
                num_bytes=sum(lengths) * record_bytes,
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=_features(layout.seq_len, layout.dtype),
        split_infos=infos,
        check_data=False,  # the check reads with TensorFlow
        description="Token windows grouped by domain; record offsets[k] + j is window j of k.",
    )


class _Records:
    """The records of a split by number, from all its files; for any number of threads.

    ArrayRecord's own data source starts a thread for every file that a batch touches, and its read
    of a list of records passes over the index of the whole file. A range has neither cost.
    """

    def __init__(self, directory: pathlib.Path, window_files: Sequence[dict[str, Any]]):
        self._paths = [str(directory / file["name"]) for file in window_files]
        self._ends = np.cumsum([file["windows"] for file in window_files])
        self._readers: dict[int, Any] = {}

    def read(self, ids: np.ndarray) -> list[bytes]:
        """The records with these numbers, in this order."""
        file = np.searchsorted(self._ends, ids, side="right")
        record = ids - np.concatenate([[0], self._ends])[file]
        return [self._reader(f).read(i, i + 1)[0] for f, i in zip(file.tolist(), record.tolist())]

    def _reader(self, file: int) -> Any:
        if file not in self._readers:
            from array_record.python import array_record_module

            reader = array_record_module.ArrayRecordReader(
                self._paths[file], _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
            )
            self._readers.setdefault(file, reader)  # another thread may have been faster
        return self._readers[file]


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A prepared corpus; cheap to open, windows are read on demand by any number of threads."""

    path: pathlib.Path
    manifest: dict[str, Any]
    domains: list[dict[str, Any]]
    num_domains: int  # K
    seq_len: int  # L
    vocab_size: int  # of the tokenizer; the model's may be larger
    eos_id: int
    offsets: dict[str, np.ndarray]  # split -> int64 [K + 1], first record of each domain
    pad: dict[str, np.ndarray]  # split -> int64 [K], filling targets in a domain's last window
    domain_frequencies: np.ndarray  # float64 [K], shares of train *windows*
    fingerprint: str  # of the content: the same wherever and whenever it was prepared
    _records: dict[str, _Records] = dataclasses.field(default_factory=dict, repr=False)

    def label(self, domain: int) -> str:
        """A few words that tell what the documents of a domain are about."""
        return self.domains[domain]["label"]

    def tokenizer(self) -> tokenizer_lib.Tokenizer:
        """The tokenizer of the windows."""
        return tokenizer_lib.load_tokenizer(self.path / "tokenizer.json")

    def embedder(self) -> Embedder:
        """The embedder that the centroids were made with."""
        return load_embedder(self.path)

    def centroids(self) -> np.ndarray:
        """float32 [K, dim], unit rows."""
        return safetensors.numpy.load_file(self.path / "centroids.safetensors")["centroids"]

    def similarity_quantiles(self) -> dict[float, float]:
        """Quantiles of the similarity of train documents to their own centroid."""
        tensors = safetensors.numpy.load_file(self.path / "centroids.safetensors")
        return dict(zip(domains.QUANTILES, tensors["similarity_quantiles"].tolist()))

    def source(self, split: str) -> Any:
        """The TFDS data source of a split: `source[i]["tokens"]` is window i."""
        import tensorflow_datasets as tfds

        self._check_split(split)
        if self.offsets[split][-1] == 0:
            return ()
        return tfds.builder_from_directory(self.path / "windows").as_data_source(split)

    def read_windows(self, split: str, record_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """int32 [n, L + 1]: the windows with these record numbers, in this order.

        The same tokens as `source(split)` gives, without decoding an Example each: every record
        ends with the raw bytes of its tokens.

        Raises:
          ValueError: a record number outside [0, offsets[split][K]).
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
            records = _Records(self.path / "windows", self.manifest["window_files"][split])
            self._records.setdefault(split, records)  # another thread may have been faster
        data = np.frombuffer(b"".join(self._records[split].read(ids)), np.uint8)
        data = data.reshape(len(ids), -1)[:, -dtype.itemsize * (self.seq_len + 1) :]
        return np.ascontiguousarray(data).view(dtype).astype(np.int32)

    def summary(self) -> list[str]:
        """Lines on what was read, dropped and damaged, and what came of it."""
        counts = self.manifest["counts"]
        lines = [
            f"{self.path}: {counts['documents']:,} documents read, {counts['duplicates']:,} "
            f"duplicates and {counts['too_short']:,} too short ones dropped, {counts['cut']:,} "
            f"long ones cut; {self.num_domains} domains, vocabulary of {self.vocab_size:,}"
        ]
        for split, count in counts["splits"].items():
            lines.append(
                f"  {split}: {count['documents']:,} documents, {count['bytes'] / 1e6:,.1f} MB, "
                f"{count['tokens']:,} tokens, {count['windows']:,} windows of {self.seq_len}"
            )
        damage = corpus.Report(files.read_json(self.path / "report.json")).lines()
        lines.append(
            f"  damaged: {counts['damaged']}" + (" (all in report.json)" if damage else "")
        )
        return lines + [f"    {line}" for line in damage]

    def verify(self) -> None:
        """Compare the SHA-256 of every artefact with the manifest; reads the whole folder.

        Raises:
          UserError: files that are missing or changed.
        """
        changed = [
            name
            for name, artefact in self.manifest["artefacts"].items()
            if not (self.path / name).is_file()
            or files.sha256_file(self.path / name) != artefact["sha256"]
        ]
        if changed:
            raise UserError(
                f"the corpus {self.path} is damaged: {', '.join(changed)} differ from its "
                "manifest. Delete the folder and run `soup-jax prepare` again"
            )

    def _check_split(self, split: str) -> None:
        if split not in self.offsets:
            raise UserError(
                f"the corpus {self.path} has no split {split!r}; it has {', '.join(self.offsets)}"
            )


def open_corpus(directory: str | os.PathLike) -> Corpus:
    """Open a prepared corpus and check that its files are there, with their sizes.

    Raises:
      UserError: not a corpus, an unfinished or incomplete one, or one of another version.
    """
    path = pathlib.Path(directory)
    advice = "run `soup-jax prepare` with this --config.corpus.dir"
    if not (path / "manifest.json").exists():
        state = "is not finished" if (path / ".work").exists() else "is not a prepared corpus"
        raise UserError(f"{path} {state} (it has no manifest.json): {advice}")
    manifest = files.read_json(path / "manifest.json")
    files.read_format(manifest, path / "manifest.json", newest=FORMAT_VERSION)
    for name, artefact in manifest["artefacts"].items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != artefact["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(
                f"the corpus {path} is damaged: {name} {found}, the manifest says "
                f"{artefact['bytes']} bytes. Delete the folder and {advice}"
            )
    tensors = safetensors.numpy.load_file(path / "offsets.safetensors")
    splits = [split for split in SPLITS if f"offsets/{split}" in tensors]
    offsets = {split: tensors[f"offsets/{split}"] for split in splits}
    windows = np.diff(offsets["train"])
    return Corpus(
        path=path,
        manifest=manifest,
        domains=files.read_json(path / "domains.json"),
        num_domains=len(windows),
        seq_len=manifest["seq_len"],
        vocab_size=manifest["vocab_size"],
        eos_id=manifest["eos_id"],
        offsets=offsets,
        pad={split: tensors[f"pad/{split}"] for split in splits},
        domain_frequencies=windows / windows.sum(),
        fingerprint=manifest["fingerprint"],
    )
