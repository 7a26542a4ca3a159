"""The sampling plan: which windows every step reads, as a pure function of (seed, step).

For a step, `h_MK` is drawn from the meta-distribution and each row of the batch gets a domain drawn
from its mixture's `h` (Algorithm 1 of the paper). The windows of a domain are visited without
replacement, in an order freshly shuffled for each pass over the domain; how often a domain was
drawn before a step follows from the steps before, so the whole plan is determined by the seed and
is the same on every process, whatever their number. Nothing here reads data.

Randomness: `numpy.random.Philox(key=[seed, step])` for the draws; a keyed Feistel network for the
order within a domain, so that no permutation of a large domain is ever stored.
"""

import collections
import dataclasses
import json
import threading

import numpy as np

from soup_jax.domain_weights import MetaDistribution, sample_domain_weights
from soup_jax.files import sha256_bytes

_SNAPSHOT_STEPS = 4096  # distance of the cursors kept for going back
_RECENT_PLANS = 1024  # plans kept for the reader threads, which ask slightly out of order


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one step reads.

    Attributes:
      h_MK: domain weights of each mixture, float64.
      domain_B: domain of each row; rows are ordered by mixture, B / M rows each.
      window_B: window within the domain, 0 <= window < number of windows of the domain.
      epoch_B: passes over the row's domain that were complete before it.
    """

    h_MK: np.ndarray
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
    half_bits = np.array([max(3, (int(s - 1).bit_length() + 1) // 2) for s in size], np.uint64)
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
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class SamplingPlan:
    """`plan[step]` is a StepPlan; safe to use from several threads.

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
    ):
        """`num_windows_K` counts the windows of each domain; domains of pi must have some."""
        if batch_size % num_mixtures:
            raise ValueError(f"{num_mixtures} mixtures do not divide {batch_size} rows")
        if ((meta.frequencies_K > 0) & (num_windows_K == 0)).any():
            raise ValueError("a domain with natural frequency above zero has no windows")
        self.meta = meta
        self.num_windows_K = np.asarray(num_windows_K, np.int64)
        self.batch_size = batch_size
        self.num_mixtures = num_mixtures
        self.seed = seed
        self._lock = threading.Lock()
        self._step = 0
        self._cursor_K = np.zeros(len(num_windows_K), np.int64)
        self._snapshots = {0: self._cursor_K.copy()}
        self._recent: collections.OrderedDict[int, StepPlan] = collections.OrderedDict()

    def fingerprint(self) -> str:
        """Hash of everything that determines the plan: pi, domain sizes, seed, B and M."""
        value = [self.meta.fingerprint(), self.num_windows_K.tolist(), self.batch_size]
        value += [self.num_mixtures, self.seed]
        return sha256_bytes(json.dumps(value).encode())

    def __getitem__(self, step: int) -> StepPlan:
        """The plan of `step`."""
        with self._lock:
            if step not in self._recent:
                self._seek(step)
                self._advance()
            return self._recent[step]

    def cursors(self, step: int) -> np.ndarray:
        """int64 [K]: how often each domain was drawn in the steps before `step`."""
        with self._lock:
            self._seek(step)
            return self._cursor_K.copy()

    def restore(self, step: int, cursor_K: np.ndarray) -> None:
        """Continue at `step` from cursors that `cursors(step)` returned, without a replay."""
        with self._lock:
            self._step, self._cursor_K = step, np.asarray(cursor_K, np.int64).copy()
            self._snapshots[step] = self._cursor_K.copy()

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
        step = self._step
        h_MK, domain_B = self._draw(step)
        # Rows of one domain take its next positions in row order.
        order = np.argsort(domain_B, kind="stable")
        sorted_B = domain_B[order]
        rank = np.arange(self.batch_size) - np.searchsorted(sorted_B, sorted_B, side="left")
        position_B = np.empty_like(domain_B)
        position_B[order] = self._cursor_K[sorted_B] + rank
        size_B = self.num_windows_K[domain_B]
        epoch_B = position_B // size_B
        seed_B = np.full(self.batch_size, self.seed, np.uint64)
        key_B = _mix(_mix(_mix(seed_B) ^ domain_B.astype(np.uint64)) ^ epoch_B.astype(np.uint64))
        window_B = shuffled_index(position_B % size_B, size_B, key_B)
        self._count(domain_B)
        self._recent[step] = StepPlan(h_MK, domain_B, window_B, epoch_B)
        while len(self._recent) > _RECENT_PLANS:
            self._recent.popitem(last=False)

    def _draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        h_MK = sample_domain_weights(self.meta, rng, num_mixtures=self.num_mixtures)
        u_B = rng.random(self.batch_size).reshape(self.num_mixtures, -1)
        domains = []
        for h_K, u in zip(h_MK, u_B):
            support = np.flatnonzero(h_K)
            cumulative = np.cumsum(h_K[support])
            # Dividing by the last value makes it exactly 1 > u: rounding cannot leave the support.
            domains.append(support[np.searchsorted(cumulative / cumulative[-1], u, side="right")])
        return h_MK, np.concatenate(domains).astype(np.int64)
