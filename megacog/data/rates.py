"""At which frame rate, and where, a stage looks at a clip.

Codes are stored per frame at one rate, so a lower rate is a stride: a clip stored at 8 fps holds its
1 fps version in every eighth frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megacog.config.schema import RatesConfig, Stage
from megacog.data.draws import below, unit

# 24000/1001 fps and its like (0.1 % off) count as their nominal rates.
TOLERANCE = 2e-3


@dataclass(frozen=True)
class Rate:
    """One way to look at a clip: every `stride`-th stored frame, which makes `fps` frames per second."""

    fps: float
    stride: int


@dataclass(frozen=True)
class Window:
    """The frames of one sample: `first`, `first + stride`, ...

    Attributes:
        first: index of the first frame in the clip.
        stride: stored frames from one to the next.
        fps: real rate; 0 for single frames.
        frames: how many.
    """

    first: int
    stride: int
    fps: float
    frames: int

    @property
    def indices(self) -> range:
        """Indices into the clip."""
        return range(self.first, self.first + self.stride * self.frames, self.stride)

    @property
    def span_seconds(self) -> float | None:
        """Seconds from the first to the last frame; None for a single frame."""
        return (self.frames - 1) / self.fps if self.frames > 1 else None


class RateRule:
    """The rule of one stage.

    base takes one frame of every clip. sequential follows `rates.policy` over `rates.series`.
    interpolation draws uniformly from the feasible ones of `rates.interpolation`, because recursive
    generation uses every one of them. A clip stored at a rate that neither list knows is used at
    its stored rate.
    """

    def __init__(
        self, stage: Stage, num_frames: int, config: RatesConfig, base_frame: Literal["any", "first"] = "any"
    ) -> None:
        """Args:
        stage: which stage.
        num_frames: frames of a sequence (1 is used for base).
        config: `data.rates`.
        base_frame: `data.base_frame`.
        """
        self.stage, self.config, self.base_frame = stage, config, base_frame
        self.frames = 1 if stage == "base" else num_frames
        self._rates = config.interpolation if stage == "interpolation" else config.series
        self._known = (*config.series, *config.interpolation)
        self.feasible = lru_cache(maxsize=1 << 16)(self._feasible)

    @property
    def phase_starts(self) -> tuple[int, ...]:
        """First step of every phase; the first is 0. The base stage has one phase."""
        steps = [phase.from_step for phase in self.config.phases] if self.stage != "base" else []
        return (*([] if steps[:1] == [0] else [0]), *steps)

    def min_fps(self, step: int) -> float:
        """Returns the lowest rate that may be used at an optimizer step."""
        return max([phase.min_fps for phase in self.config.phases if phase.from_step <= step][-1:], default=0.0)

    def _feasible(self, length: int, stored_fps: float, min_fps: float = 0.0) -> tuple[Rate, ...]:
        """Returns the rates, ascending, at which a clip holds the stage's frames.

        Args:
            length: stored frames of the clip.
            stored_fps: rate at which they were sampled.
            min_fps: lower rates are not wanted.
        """
        if self.stage == "base":
            return (Rate(0.0, 1),)
        strides = [1]
        if any(_stride(stored_fps, rate) == 1 for rate in self._known):
            strides = [stride for rate in self._rates if (stride := _stride(stored_fps, rate))]
        return tuple(
            Rate(stored_fps / stride, stride)
            for stride in sorted(set(strides), reverse=True)
            if (self.frames - 1) * stride < length and stored_fps / stride >= min_fps * (1 - TOLERANCE)
        )

    def probabilities(self, rates: Sequence[Rate]) -> list[float]:
        """Returns how likely each of the feasible rates is."""
        count = len(rates)
        if self.stage == "interpolation" or count < 2:
            return [1 / count] * count
        lowest = 1.0 if self.config.policy == "lowest" else self.config.lowest_probability
        rest = (1 - lowest) / count
        return [lowest + rest, *[rest] * (count - 1)]

    def window(self, length: int, rates: Sequence[Rate], numbers: Sequence[int]) -> Window:
        """Returns the frames of one sample.

        Args:
            length: stored frames of the clip.
            rates: feasible rates of the clip; not empty.
            numbers: three uniform 64-bit numbers: lowest or any, which one, where.
        """
        if self.stage == "base":
            first = below(numbers[2], length) if self.base_frame == "any" else 0
            return Window(first, 1, 0.0, 1)
        lowest = self.config.policy == "lowest" or unit(numbers[0]) < self.config.lowest_probability
        if lowest and self.stage != "interpolation":
            rate = rates[0]
        else:
            rate = rates[below(numbers[1], len(rates))]
        starts = length - (self.frames - 1) * rate.stride
        return Window(below(numbers[2], starts), rate.stride, rate.fps, self.frames)


def _stride(stored_fps: float, rate: float) -> int:
    """Returns how many stored frames make one step at `rate`; 0 if that is no whole number."""
    stride = round(stored_fps / rate)
    return stride if stride and abs(stored_fps / rate / stride - 1) < TOLERANCE else 0
