"""Which rates a clip can be trained at, and where the window lies."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacog.config.schema import RatePhase, RatesConfig
from megacog.data.draws import below, draw, unit
from megacog.data.rates import RateRule

U64 = st.integers(0, 2**64 - 1)


def feasible(stage: str, length: int, fps: float, min_fps: float = 0.0, **config: object) -> list[float]:
    rule = RateRule(stage, 5, RatesConfig(**config))
    return [rate.fps for rate in rule.feasible(length, fps, min_fps)]


def test_lower_rates_are_feasible_as_far_as_the_clip_is_long() -> None:
    assert feasible("sequential", 4, 8.0) == []
    assert feasible("sequential", 5, 8.0) == [8.0]
    assert feasible("sequential", 8, 8.0) == [8.0]
    assert feasible("sequential", 9, 8.0) == [4.0, 8.0]
    assert feasible("sequential", 33, 8.0) == [1.0, 2.0, 4.0, 8.0]
    assert feasible("sequential", 129, 8.0) == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]


def test_interpolation_has_its_own_rates() -> None:
    assert feasible("interpolation", 129, 8.0) == [2.0, 4.0, 8.0]
    assert feasible("interpolation", 129, 1.0) == []


def test_a_rate_that_is_no_whole_stride_is_not_feasible() -> None:
    assert feasible("sequential", 100, 6.0, series=(1.0, 4.0, 6.0)) == [1.0, 6.0]


def test_a_stored_rate_outside_the_series_is_used_as_it_is() -> None:
    assert feasible("sequential", 100, 5.0) == [5.0]
    assert feasible("interpolation", 100, 12.5) == [12.5]


def test_an_ntsc_rate_counts_as_its_nominal_one_and_keeps_its_real_span() -> None:
    ntsc = 8000 / 1001
    rates = feasible("sequential", 17, ntsc)
    assert rates == [ntsc / 4, ntsc / 2, ntsc]


def test_a_minimum_rate_removes_the_lower_ones() -> None:
    assert feasible("sequential", 129, 8.0, min_fps=1.0) == [1.0, 2.0, 4.0, 8.0]
    assert feasible("sequential", 129, 0.5, min_fps=1.0) == []


def test_phases_start_at_their_steps() -> None:
    phases = (RatePhase(from_step=10, min_fps=0.25), RatePhase(from_step=20, min_fps=1.0))
    rule = RateRule("sequential", 5, RatesConfig(phases=phases))
    assert rule.phase_starts == (0, 10, 20)
    assert [rule.min_fps(step) for step in (0, 9, 10, 19, 20, 999)] == [0.0, 0.0, 0.25, 0.25, 1.0, 1.0]
    from_zero = RatesConfig(phases=(RatePhase(from_step=0, min_fps=0.25),))
    assert RateRule("sequential", 5, from_zero).phase_starts == (0,)
    assert RateRule("base", 5, RatesConfig(phases=phases)).phase_starts == (0,)


def chosen(rule: RateRule, length: int, count: int = 2000) -> dict[float, float]:
    """Shares of the rates over `count` samples."""
    rates = rule.feasible(length, 8.0)
    windows = [rule.window(length, rates, draw(0, "test", sample)[:3]) for sample in range(count)]
    return {rate.fps: sum(window.fps == rate.fps for window in windows) / count for rate in rates}


def test_lowest_takes_the_lowest_feasible_rate() -> None:
    assert chosen(RateRule("sequential", 5, RatesConfig()), 33) == {1.0: 1.0, 2.0: 0.0, 4.0: 0.0, 8.0: 0.0}


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        ("sequential", {"policy": "mixture", "lowest_probability": 0.4}),
        ("sequential", {"policy": "mixture", "lowest_probability": 0.0}),
        ("interpolation", {"policy": "lowest"}),
    ],
    ids=["mixture", "uniform", "interpolation"],
)
def test_chosen_rates_follow_their_probabilities(stage: str, config: dict[str, object]) -> None:
    rule = RateRule(stage, 5, RatesConfig(**config))
    shares = chosen(rule, 33)
    probabilities = rule.probabilities(rule.feasible(33, 8.0))
    assert sum(probabilities) == pytest.approx(1)
    # 4 standard deviations of a share over 2000 draws
    assert list(shares.values()) == pytest.approx(probabilities, abs=4 * math.sqrt(0.25 / 2000))
    if stage == "interpolation":
        assert probabilities == pytest.approx([1 / 3] * 3)


@given(st.integers(5, 200), U64, U64, U64)
def test_every_window_lies_inside_the_clip(length: int, a: int, b: int, c: int) -> None:
    rule = RateRule("sequential", 5, RatesConfig(policy="mixture"))
    window = rule.window(length, rule.feasible(length, 8.0), (a, b, c))
    assert len(window.indices) == 5
    assert 0 <= window.indices[0] and window.indices[-1] < length
    assert window.span_seconds == (window.indices[-1] - window.indices[0]) / 8.0


def test_windows_start_anywhere_that_is_feasible_and_equally_often() -> None:
    rule = RateRule("sequential", 5, RatesConfig())
    rates = rule.feasible(36, 8.0)
    starts = [rule.window(36, rates, draw(3, "test", sample)[:3]).first for sample in range(2000)]
    counts = [starts.count(start) for start in range(5)]
    assert sum(counts[:4]) == 2000 and min(counts[:4]) > 400


def test_base_takes_one_frame_of_every_clip() -> None:
    rule = RateRule("base", 5, RatesConfig(), "any")
    rates = rule.feasible(3, 8.0)
    firsts = {rule.window(3, rates, draw(0, "test", sample)[:3]).first for sample in range(100)}
    assert firsts == {0, 1, 2}
    first = RateRule("base", 5, RatesConfig(), "first").window(3, rates, (2**64 - 1,) * 3)
    assert first.indices == range(0, 1) and first.span_seconds is None
    assert rule.feasible(1, 8.0)


@given(U64, st.integers(1, 2**40))
def test_draws_stay_in_range(number: int, count: int) -> None:
    assert 0 <= below(number, count) < count
    assert 0 <= unit(number) < 1


def test_draws_depend_on_every_part_of_their_key() -> None:
    keys = [(0, "a", 1, 2), (1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 2), (0, "a", 12), (0, "a", 1, 2, 0)]
    draws = [draw(*key) for key in keys]
    assert len({number for numbers in draws for number in numbers}) == 8 * len(keys)
    assert draw(0, "a", 1, 2) == draws[0]
    # Other numbers would change the samples of every run and break resuming.
    assert draw(7, "golden", 1)[0] == 10463218128904301727
