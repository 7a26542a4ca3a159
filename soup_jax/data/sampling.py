"""The sampling plan: which windows every step reads, as a pure function of (seed, step).

A step draws `h_MK` from the meta-distribution, and for each row of the batch a domain from its
mixture's `h` (Algorithm 1 of the paper). The windows of a domain are visited without replacement,
in an order that is shuffled anew for each pass over the domain. How often a domain was drawn before
a step follows from the steps before. So the seed determines the whole plan, and the plan is the
same on every process, for any number of processes. Nothing here reads data.

`skip_batches` leaves batches out: the plan itself stays the same, and step s of the run takes the
s-th of the plan's steps that are left.

Randomness: `numpy.random.Philox(key=[seed, step])` for the draws; a keyed Feistel network for the
order within a domain, so that no permutation of a large domain is ever stored.
"""

import bisect
import collections
import dataclasses
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from soup_jax.data.meta_distribution import MetaDistribution, sample_domain_weights
from soup_jax.storage import sha256_bytes

_SNAPSHOT_STEPS = 4096  # distance of the cursors kept for going back
_RECENT_PLANS = 1024  # plans kept for those who ask later: reader threads, logs, checkpoints
_RECENT_BYTES = 128 << 20  # of domain weights kept with them; older ones are drawn again if asked
_NEAR_STEPS = 512  # asked for so far ahead, the steps between are planned too
_BLOCK_ROWS = 512  # planned at a time: the cost is in the calls, hardly in the rows


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one step reads.

    Attributes:
      h_MK: domain weights of each mixture, float64; None only inside SamplingPlan.
      domain_B: domain of each row; rows are ordered by mixture, B / M rows each.
      window_B: window within the domain, 0 <= window < number of windows of the domain.
      epoch_B: passes over the row's domain that were complete before it.
    """

    h_MK: Any
    domain_B: np.ndarray
    window_B: np.ndarray
    epoch_B: np.ndarray


def shuffled_index(
    position: np.ndarray, size: np.ndarray, key: np.ndarray, *, num_rounds: int = 6
) -> np.ndarray:
    """A keyed permutation of range(size), evaluated at `position`; all arguments [n], vectorised.

    A balanced Feistel network over the smallest even number of bits that holds `size` (six at
    least: narrower ones reach too few permutations), walked until the value falls inside the
    range. For one (size, key) the map is a bijection, whatever the round function.
    """
    size = np.asarray(size, np.uint64)
    # The exponent of size - 1 as a float is its number of bits, exactly below 2 ** 53.
    num_bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1]
    half_bits = np.maximum(3, (num_bits + 1) // 2).astype(np.uint64)
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    key = np.asarray(key, np.uint64)
    value = np.asarray(position, np.uint64).copy()
    round_keys = [_mix(key + np.uint64(i)) for i in range(num_rounds)]
    walking = np.arange(len(value))
    while walking.size:
        shift, low = half_bits[walking], mask[walking]
        left, right = value[walking] >> shift, value[walking] & low
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key[walking]) & low)
        value[walking] = (left << shift) | right
        walking = walking[value[walking] >= size[walking]]
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    # The finaliser of SplitMix64: every input bit reaches every output bit. Wrap-around is meant.
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def plan_index(step: int, skip: Sequence[tuple[int, int]]) -> int:
    """The step of the plan that a run's `step` takes: the `step`-th, from 0, of those not skipped.

    `skip` holds (first, last) of skipped plan steps, ascending, both included.
    """
    for first, last in skip:
        if step < first:
            break
        step += last - first + 1
    return step


class SamplingPlan:
    """`plan[step]` is the StepPlan of a run's step; safe to use from several threads.

    `index(step)` is the step of the plan that it takes; cursors are those of plan steps.
    Going forward costs one step's draws a step. `seek` goes anywhere: exactly, from cursors that a
    checkpoint kept, or by replaying the draws of the steps before (no data is read).
    """

    def __init__(
        self,
        meta: MetaDistribution,
        *,
        num_windows_K: np.ndarray,
        batch_size: int,
        num_mixtures: int,
        seed: int,
        skip: Sequence[tuple[int, int]] = (),
    ):
        """`num_windows_K` counts the windows of each domain; domains of pi must have some.

        `skip` holds (first, last) of plan steps that no step takes, ascending, both included.
        """
        if batch_size % num_mixtures:
            raise ValueError(f"{num_mixtures} mixtures do not divide {batch_size} rows")
        if ((meta.frequencies_K > 0) & (num_windows_K == 0)).any():
            raise ValueError("a domain with natural frequency above zero has no windows")
        self.meta = meta
        self.num_windows_K = np.asarray(num_windows_K, np.int64)
        self.batch_size = batch_size
        self.num_mixtures = num_mixtures
        self.seed = seed
        self.skip = tuple(skip)
        self._lock = threading.Lock()
        self._step = 0
        self._cursor_K = np.zeros(len(num_windows_K), np.int64)
        self._snapshots = {0: self._cursor_K.copy()}
        self._block_steps = max(1, _BLOCK_ROWS // batch_size)
        h_bytes = num_mixtures * self.num_windows_K.size * 8
        self._recent_h = max(2 * self._block_steps, _RECENT_BYTES // h_bytes)
        self._recent: collections.OrderedDict[int, StepPlan] = collections.OrderedDict()

    def fingerprint(self) -> str:
        """Hash of everything that determines the plan: pi, domain sizes, seed, B and M."""
        value = [self.meta.fingerprint(), self.num_windows_K.tolist(), self.batch_size]
        value += [self.num_mixtures, self.seed]
        return sha256_bytes(json.dumps(value).encode())

    def index(self, step: int) -> int:
        """The step of the plan that a run's `step` takes."""
        return plan_index(step, self.skip)

    def __getitem__(self, step: int) -> StepPlan:
        """The plan of a run's `step`."""
        index = self.index(step)
        plan = self._recent.get(index)  # without the lock, which a thread that plans may hold
        if plan is None:
            with self._lock:
                if index not in self._recent:
                    # Readers ask out of order. To jump to the step of the foremost would be to
                    # come back for the others, through the draws of all steps since a snapshot.
                    if not self._step <= index < self._step + _NEAR_STEPS:
                        self._seek(index)
                    while self._step <= index:
                        self._advance()
                plan = self._recent[index]
        if plan.h_MK is None:
            plan = dataclasses.replace(plan, h_MK=self._draw(index)[0])
        return plan

    def cursors(self, index: int) -> np.ndarray:
        """int64 [K]: how often each domain was drawn in the plan steps before `index`."""
        with self._lock:
            ahead = range(index, self._step)
            if not ahead or not all(s in self._recent for s in ahead):
                self._seek(index)
                ahead = range(0)
            cursor_K = self._cursor_K.copy()
            # Readers run ahead of the step that is saved: take back what was planned since.
            for s in ahead:
                np.subtract.at(cursor_K, self._recent[s].domain_B, 1)
            return cursor_K

    def restore(self, index: int, cursor_K: np.ndarray) -> None:
        """Continue at plan step `index` from cursors that `cursors(index)` returned, without a
        replay."""
        with self._lock:
            self._step, self._cursor_K = index, np.asarray(cursor_K, np.int64).copy()
            self._snapshots[index] = self._cursor_K.copy()

    def _seek(self, step: int) -> None:
        if self._step > step:
            self._step = max(s for s in self._snapshots if s <= step)
            self._cursor_K = self._snapshots[self._step].copy()
        while self._step < step:
            self._count(self._draw(self._step)[1])

    def _count(self, domain_B: np.ndarray) -> None:
        np.add.at(self._cursor_K, domain_B, 1)
        self._step += 1
        if self._step % _SNAPSHOT_STEPS == 0:
            self._snapshots[self._step] = self._cursor_K.copy()

    def _advance(self) -> None:
        steps = range(self._step, self._step + self._block_steps)
        draws = [self._draw(step) for step in steps]
        domain_N = np.concatenate([domain_B for _, domain_B in draws])  # rows of all these steps
        # Rows of one domain take its next positions in row order.
        order = np.argsort(domain_N, kind="stable")
        sorted_N = domain_N[order]
        rank = np.arange(len(domain_N)) - np.searchsorted(sorted_N, sorted_N, side="left")
        position_N = np.empty_like(domain_N)
        position_N[order] = self._cursor_K[sorted_N] + rank
        size_N = self.num_windows_K[domain_N]
        epoch_N = position_N // size_N
        seed_N = np.full(len(domain_N), self.seed, np.uint64)
        key_N = _mix(_mix(_mix(seed_N) ^ domain_N.astype(np.uint64)) ^ epoch_N.astype(np.uint64))
        window_N = shuffled_index(position_N % size_N, size_N, key_N)
        rows = zip(np.split(window_N, len(steps)), np.split(epoch_N, len(steps)))
        for step, (h_MK, domain_B), (window_B, epoch_B) in zip(steps, draws, rows):
            self._count(domain_B)
            self._recent[step] = StepPlan(h_MK, domain_B, window_B, epoch_B)
        self._forget()

    def _forget(self) -> None:
        while len(self._recent) > _RECENT_PLANS:
            self._recent.popitem(last=False)
        aged = slice(-self._recent_h - self._block_steps, -self._recent_h)
        for step in list(self._recent)[aged]:
            self._recent[step] = dataclasses.replace(self._recent[step], h_MK=None)

    def _draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        h_MK = sample_domain_weights(self.meta, rng, step=step, num_mixtures=self.num_mixtures)
        u_MR = rng.random(self.batch_size).reshape(self.num_mixtures, -1)
        # All rows' supports at once: a call for each of them lets other threads in each time.
        mixture, support = np.nonzero(h_MK)
        weight = h_MK[mixture, support]
        ends = np.cumsum(np.bincount(mixture, minlength=self.num_mixtures)).tolist()
        domains = []
        for begin, end, u_R in zip([0, *ends], ends, u_MR.tolist()):
            cumulative = np.cumsum(weight[begin:end])
            # Dividing by the last value makes it exactly 1 > u: rounding cannot leave the support.
            thresholds = memoryview(cumulative / cumulative[-1])
            domains += [support[begin + bisect.bisect_right(thresholds, u)] for u in u_R]
        return h_MK, np.array(domains, np.int64)
