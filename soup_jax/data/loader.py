"""From the sampling plan to device arrays: grain reads, batches and prefetches.

1. SamplingPlan: step -> (h, domain, window) of all B rows, the same on every process
2. BatchSource: step -> this process's rows as NumPy arrays (soup_jax/data/corpus.py)
3. grain: BatchSource in step order, read ahead by threads
4. `to_device`: local rows -> arrays sharded over the mesh

The rows of a batch:
    tokens       int32 [B, L + 1]   inputs are [:, :-1], targets [:, 1:]
    num_targets  int32 [B]          targets that are text; the rest of the window is padding
"""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from soup_jax.data.corpus import Corpus
from soup_jax.data.sampling import SamplingPlan
from soup_jax.errors import UserError
from soup_jax.soup import Batch, layout


class BatchSource:
    """Random access by step; what grain calls a data source."""

    def __init__(self, corpus: Corpus, plan: SamplingPlan, *, rows: np.ndarray, num_steps: int):
        """`rows` are the global rows of the batch that this process reads."""
        self._corpus, self._plan = corpus, plan
        self._rows, self._num_steps = rows, num_steps

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> Batch:
        plan = self._plan[int(step)]
        domain = plan.domain_B[self._rows]
        window = plan.window_B[self._rows]
        record = self._corpus.offsets["train"][domain] + window
        return Batch(
            rows={
                "tokens": self._corpus.read_windows("train", record),
                "num_targets": self._corpus.num_targets("train", record),
            },
            h_MK=plan.h_MK.astype(np.float32),
            domain_B=domain.astype(np.int32),
        )


def process_rows(batch_sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Global rows of the batch that live on this process's devices, ascending."""
    slices = batch_sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def batches(
    corpus: Corpus,
    plan: SamplingPlan,
    *,
    rows: np.ndarray,
    start_step: int,
    num_steps: int,
    num_threads: int,
    prefetch: int,
) -> Iterator[Batch]:
    """This process's batches of steps [start_step, num_steps), read ahead in threads."""
    source = BatchSource(corpus, plan, rows=rows, num_steps=num_steps)
    dataset = grain.MapDataset.source(source)[start_step:]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(options))


def to_device(batch: Batch, mesh: Mesh) -> Batch:
    """Global arrays from this process's rows: rows over the mesh, `h_MK` everywhere."""
    by_row, everywhere = layout.batch(mesh), layout.replicated(mesh)
    local_rows = len(batch.domain_B)
    batch_size = local_rows * mesh.size // len(by_row.addressable_devices)
    rows = process_rows(by_row, batch_size)

    def spread(value: np.ndarray) -> jax.Array:
        # By row numbers: the devices of a process need not lie side by side in the mesh.
        def part(index: Any) -> np.ndarray:
            wanted = np.arange(batch_size)[index[0]]
            return value[np.searchsorted(rows, wanted)]

        return jax.make_array_from_callback((batch_size, *value.shape[1:]), by_row, part)

    return Batch(
        rows={name: spread(value) for name, value in batch.rows.items()},
        h_MK=jax.make_array_from_process_local_data(everywhere, batch.h_MK),
        domain_B=spread(batch.domain_B),
    )


def check_corpus(corpus: Corpus, *, num_domains: int, seq_len: int, vocab_size: int) -> None:
    """Refuse a corpus that the config does not describe.

    Raises:
      UserError: domains or window length differ, or its tokenizer has more tokens than the model.
    """
    problems = []
    if corpus.num_domains != num_domains:
        has = " or ".join(map(str, reversed(corpus.tree().sizes)))
        problems.append(f"num_domains is {num_domains}, the corpus has {has}")
    if corpus.seq_len != seq_len:
        problems.append(f"seq_len is {seq_len}, the corpus has windows of {corpus.seq_len}")
    if corpus.vocab_size > vocab_size:
        problems.append(f"vocab_size is {vocab_size}, the tokenizer has {corpus.vocab_size}")
    if problems:
        raise UserError(
            f"the config does not fit the corpus {corpus.path}: {'; '.join(problems)}. Set the "
            "fields to the corpus's values, or prepare another corpus (--config.corpus.dir)"
        )
