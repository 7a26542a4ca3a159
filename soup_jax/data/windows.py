"""Token windows grouped by domain: what is in one, where it lies, and how they are written.

Window j of domain k in a split is record `offsets[k] + j`. The stream of a domain is EOS, then its
documents in corpus order, each with EOS after it; window j holds tokens [j * L, j * L + L] of the
stream, so neighbours share one token and *every* token but the leading EOS is a target exactly
once. The last window is filled up with EOS; `pad[k]` of its L targets are filling.

The result is a TFDS data set of ArrayRecord files. `prepare` makes the documents; `corpus` reads.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors

from soup_jax import storage as files

DATASET = "windows"
# Raw bytes of windows in one ArrayRecord file: large enough that a read of a few hundred windows
# opens few files, small enough to hold in memory while it is written.
FILE_BYTES = 128 << 20
# One record per chunk, so that a random read decompresses nothing but its record.
_WRITER_OPTIONS = "group_size:1"


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

    def tensors(self) -> dict[str, np.ndarray]:
        """`offsets` and `pad` of each split, by name."""
        named = {f"offsets/{split}": value for split, value in self.offsets.items()}
        return named | {f"pad/{split}": value for split, value in self.pad.items()}

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
