"""Which sample comes when: arithmetic on indices, no state.

The samples of a run form one endless stream. Step n takes positions n * G .. (n + 1) * G - 1 of it
(G = global batch size) however many ranks share them, so a resumed or resized run goes on exactly
where it stopped. A position leads to a source by the weights of the mixture, and to a clip by a
pseudo-random permutation of the source, a new one in each of the source's epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megacog.data.draws import draw
from megacog.errors import ConfigError

_ROUNDS = 8
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permute(indices: NDArray[np.int64], size: int, keys: Sequence[int]) -> NDArray[np.int64]:
    """Returns where a pseudo-random permutation of 0..size-1 sends `indices`, in constant memory.

    A Feistel network permutes the next power of two; a value that falls outside is sent through it
    again until it is inside (cycle walking, fewer than two rounds on average).

    Args:
        indices: int64 [K], each in 0..size-1.
        size: of the permuted range.
        keys: 8 64-bit numbers that select the permutation.
    """
    bits = max(1, (size - 1).bit_length())
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], bits, keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], bits: int, keys: Sequence[int]) -> NDArray[np.uint64]:
    """Returns a permutation of 0..2**bits-1 applied to values; the halves may differ by one bit."""
    low_bits = np.uint64(bits - bits // 2)
    low_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for turn in range(_ROUNDS):
        key = np.uint64(keys[turn])
        if turn % 2:
            high = high ^ (_mix(low ^ key) & high_mask)
        else:
            low = low ^ (_mix(high ^ key) & low_mask)
    return (high << low_bits) | low


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns values hashed by splitmix64's finalizer (wrapping 64-bit arithmetic)."""
    values = (values ^ (values >> np.uint64(30))) * _M1
    values = (values ^ (values >> np.uint64(27))) * _M2
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Sample:
    """One sample of the stream.

    Attributes:
        source: index of the source in the mixture.
        epoch: how many times the source was walked through before.
        index: of the clip among the source's usable clips.
    """

    source: int
    epoch: int
    index: int


class Mixture:
    """An endless stream over weighted sources.

    Shares follow the weights at every point of the stream (never off by more than the number of
    sources), and no clip comes twice before its source is exhausted.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, stream: int = 0) -> None:
        """Args:
        sizes: usable clips of each source, all positive.
        weights: share of each source, to any scale.
        seed: of the run.
        stream: streams of one seed are independent.
        """
        if len(sizes) != len(weights) or not sizes or min(sizes) < 1 or min(weights) <= 0:
            raise ValueError(f"a mixture needs non-empty sources and positive weights: {sizes}, {weights}")
        self.sizes, self.seed, self.stream = tuple(sizes), seed, stream
        exact = [Fraction(weight) for weight in weights]
        # Share of each source in what its predecessors leave over.
        shares = [weight / sum(exact[source:]) for source, weight in enumerate(exact)]
        self._shares = [(share.numerator, share.denominator) for share in shares]

    def source_at(self, position: int) -> tuple[int, int]:
        """Returns (source, number of earlier positions with this source) of a stream position."""
        for source, (numerator, denominator) in enumerate(self._shares):
            before = (position * numerator + denominator // 2) // denominator
            after = ((position + 1) * numerator + denominator // 2) // denominator
            if after > before:
                return source, before
            position -= before
        raise AssertionError("the last share is 1")

    def at(self, positions: Sequence[int]) -> list[Sample]:
        """Returns the samples at stream positions; costs the same for every position."""
        counted = [self.source_at(position) for position in positions]
        samples: list[Sample | None] = [None] * len(counted)
        groups: dict[tuple[int, int], list[int]] = {}
        for slot, (source, count) in enumerate(counted):
            groups.setdefault((source, count // self.sizes[source]), []).append(slot)
        for (source, epoch), slots in groups.items():
            size = self.sizes[source]
            offsets = np.array([counted[slot][1] % size for slot in slots], dtype=np.int64)
            keys = draw(self.seed, "order", self.stream, source, epoch)
            for slot, index in zip(slots, permute(offsets, size, keys).tolist(), strict=True):
                samples[slot] = Sample(source, epoch, index)
        return [sample for sample in samples if sample is not None]


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of a step are shared by micro batches and data-parallel ranks."""

    global_batch_size: int
    micro_batch_size: int
    data_rank: int = 0
    data_size: int = 1

    def __post_init__(self) -> None:
        share = self.micro_batch_size * self.data_size
        if self.global_batch_size % share:
            raise ConfigError(
                f"train.global_batch_size {self.global_batch_size} is not a multiple of "
                f"train.micro_batch_size {self.micro_batch_size} x {self.data_size} data-parallel ranks. "
                f"Choose a multiple of {share}, a smaller micro batch or fewer ranks."
            )
        if not 0 <= self.data_rank < self.data_size:
            raise ValueError(f"data rank {self.data_rank} is outside 0..{self.data_size - 1}")

    @property
    def accumulation(self) -> int:
        """Micro batches of this rank per optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_size)

    def positions(self, step: int, micro: int) -> range:
        """Returns the stream positions of one micro batch of this rank."""
        block = micro * self.data_size + self.data_rank
        first = step * self.global_batch_size + block * self.micro_batch_size
        return range(first, first + self.micro_batch_size)
