"""The order of samples is arithmetic: complete, balanced, resumable, the same for any number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacog.data.draws import draw
from megacog.data.sampler import BatchPlan, Mixture, Sample, permute
from megacog.errors import ConfigError

MIXTURES = st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 100, allow_nan=False)), min_size=1, max_size=5).map(
    lambda pairs: ([size for size, _ in pairs], [weight for _, weight in pairs])
)


@given(st.integers(1, 3000), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_permutation_reaches_every_index_once(size: int, seed: int) -> None:
    image = permute(np.arange(size), size, draw(seed, "test"))
    assert sorted(image.tolist()) == list(range(size))


def test_one_index_of_a_huge_permutation_costs_no_memory() -> None:
    size = 10**12
    image = permute(np.arange(1000), size, draw(0, "test"))
    assert len(set(image.tolist())) == 1000
    assert 0 <= image.min() and image.max() < size
    assert image.max() > size // 2


def test_permutations_look_random() -> None:
    """Every index lands everywhere about equally often."""
    counts = np.zeros((5, 5))
    for seed in range(1000):
        counts[np.arange(5), permute(np.arange(5), 5, draw(seed, "test"))] += 1
    # 200 expected each; 6 standard deviations
    assert abs(counts - 200).max() < 6 * np.sqrt(200 * 0.8)
    image = permute(np.arange(1000), 1000, draw(1, "test"))
    assert abs(np.corrcoef(np.arange(1000), image)[0, 1]) < 0.1
    assert (np.diff(image) == 1).sum() < 10


@given(MIXTURES, st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_no_clip_comes_twice_before_its_source_is_exhausted(mixture: tuple[list[int], list[float]], seed: int) -> None:
    sizes, weights = mixture
    seen: dict[tuple[int, int], list[int]] = {}
    for sample in Mixture(sizes, weights, seed).at(range(300)):
        seen.setdefault((sample.source, sample.epoch), []).append(sample.index)
    for (source, epoch), indices in seen.items():
        assert len(set(indices)) == len(indices)
        assert (source, epoch - 1) in seen or epoch == 0
        if (source, epoch + 1) in seen:
            assert sorted(indices) == list(range(sizes[source]))


@given(MIXTURES)
@settings(max_examples=40, deadline=None)
def test_shares_follow_the_weights_at_every_point(mixture: tuple[list[int], list[float]]) -> None:
    sizes, weights = mixture
    stream = Mixture(sizes, weights, 0)
    counts: Counter[int] = Counter()
    for position in range(300):
        source, earlier = stream.source_at(position)
        assert earlier == counts[source]
        counts[source] += 1
        for index, weight in enumerate(weights):
            expected = (position + 1) * weight / sum(weights)
            assert abs(counts[index] - expected) <= len(weights)


@given(MIXTURES, st.integers(0, 10**12))
@settings(max_examples=40, deadline=None)
def test_any_position_is_reached_directly(mixture: tuple[list[int], list[float]], position: int) -> None:
    stream = Mixture(*mixture, seed=1)
    together = stream.at(range(position, position + 8))
    assert together == [stream.at([position + offset])[0] for offset in range(8)]


def test_epochs_seeds_and_streams_have_orders_of_their_own() -> None:
    def order(seed: int, stream: int, epoch: int) -> list[int]:
        return [s.index for s in Mixture([50], [1.0], seed, stream).at(range(50 * epoch, 50 * epoch + 50))]

    orders = [order(0, 0, 0), order(0, 0, 1), order(1, 0, 0), order(0, 1, 0)]
    assert all(sorted(indices) == list(range(50)) for indices in orders)
    assert len({tuple(indices) for indices in orders}) == 4


def step_samples(stream: Mixture, step: int, global_batch: int, micro: int, data_size: int) -> list[Sample]:
    """All ranks' samples of a step, in stream order."""
    samples = []
    plans = [BatchPlan(global_batch, micro, rank, data_size) for rank in range(data_size)]
    for index in range(plans[0].accumulation):
        for plan in plans:
            samples += stream.at(plan.positions(step, index))
    return samples


@given(st.sampled_from([(24, 1, 1), (24, 2, 3), (24, 4, 6), (24, 1, 24)]), st.integers(0, 6), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_resuming_on_another_number_of_ranks_reads_nothing_twice_and_skips_nothing(
    layout: tuple[int, int, int], before: int, after: int
) -> None:
    stream = Mixture([30, 7], [3.0, 1.0], 5)
    resumed = [sample for step in range(before) for sample in step_samples(stream, step, 24, 3, 2)]
    for step in range(before, before + after):
        resumed += step_samples(stream, step, *layout)
    assert resumed == stream.at(range(24 * (before + after)))


def test_a_global_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="12 is not a multiple of .* 4 x 2 .*multiple of 8"):
        BatchPlan(12, 4, 0, 2)


def test_the_order_of_samples_never_changes_between_versions() -> None:
    """Another order would make resumed runs read other samples than the uninterrupted ones."""
    samples = Mixture([5, 3], [2.0, 1.0], 42).at(range(10))
    assert [(sample.source, sample.epoch, sample.index) for sample in samples] == [
        (0, 0, 0),
        (1, 0, 1),
        (0, 0, 1),
        (0, 0, 2),
        (1, 0, 2),
        (0, 0, 4),
        (0, 0, 3),
        (1, 0, 0),
        (0, 1, 3),
        (0, 1, 2),
    ]
