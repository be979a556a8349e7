"""Which codes can be sampled in the same step: all whose logits depend on nothing that is still unknown.

The row of (frame, cell) is fed with the code of the cell before it, so the cells of a frame come one after the other.
In every layer the row reads the keys that the layer's mask shows it, all of which earlier steps have written: then its
logits are those of one code at a time. Where windows hide the far part of a frame, the next frame can begin before that
one is complete.

Nothing here knows a kind of mask: the steps follow from `grid.visible` alone.

Shapes: T frames, P cells of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megacog_kernels.grid import MaskSpec, VideoGrid, visible


@dataclass(frozen=True)
class Step:
    """One pass of a few rows through the model."""

    give: tuple[int, ...]
    """Known frames that enter the caches before it."""
    tokens: tuple[int, ...]
    """Codes that it samples, frame * P + cell, of different frames."""


@dataclass(frozen=True)
class Schedule:
    """The steps of one sequence."""

    steps: tuple[Step, ...]
    frames: tuple[int, ...]
    """Sampled frames by level, then in time: as they would come one after the other."""
    lane: tuple[int, ...]
    """[T]: sampled frames that are in progress at the same time have different lanes; 0 for known frames."""

    @property
    def lanes(self) -> int:
        """Frames in progress at the same time, at most."""
        return max(self.lane) + 1

    @property
    def width(self) -> int:
        """Codes of the widest step."""
        return max((len(step.tokens) for step in self.steps), default=0)


@lru_cache(maxsize=64)
def schedule(masks: tuple[MaskSpec, ...], grid: VideoGrid, known: frozenset[int]) -> Schedule:
    """The fewest steps, each code as early as can be.

    Args:
        masks: Those of all layers and channels, in any order; all of one order table.
        grid: Frames and cells of the sequence.
        known: Frames that are given.

    Raises:
        ValueError: An unknown frame is open: its cells would have to see later ones.
    """
    order = masks[0].order
    frames = range(grid.frames)
    blind = [frame for frame in frames if order.open[frame] and frame not in known]
    if blind:
        raise ValueError(f"frames {blind} are open in this stage and must be given, they cannot be sampled")
    step_TP = np.zeros((grid.frames, grid.cells), dtype=np.int64)
    by_level = sorted(frames, key=lambda frame: (order.level[frame], frame))
    for level in sorted(set(order.level)):
        peers = [frame for frame in by_level if order.level[frame] == level]
        lower = [frame for frame in by_level if order.level[frame] < level]
        for frame in peers:
            ready_P = _ready(masks, grid, frame, lower, known, step_TP)
            if frame in known:
                step_TP[frame] = ready_P.max()
            else:  # step[p] = max(step[p - 1] + 1, ready[p])
                cells = np.arange(grid.cells)
                step_TP[frame] = cells + np.maximum.accumulate(ready_P - cells)
        together = [frame for frame in peers if order.open[frame]]
        step_TP[together] = step_TP[together].max(initial=0)
    sampled = tuple(frame for frame in by_level if frame not in known)
    return Schedule(_steps(step_TP, by_level, sampled, grid), sampled, _lanes(step_TP, sampled))


def _ready(
    masks: tuple[MaskSpec, ...], grid: VideoGrid, frame: int, lower: list[int], known: frozenset[int],
    step_TP: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """The first step that finds all keys of lower frames which each cell of a frame sees: int64 [P].

    Sampled keys are there after their step, given ones before it.
    """
    ready_P = np.zeros(grid.cells, dtype=np.int64)
    for other in lower:
        last_P = _last_seen(masks, grid, frame, other)
        there_P = step_TP[other, last_P] + (other not in known)
        ready_P = np.maximum(ready_P, np.where(last_P >= 0, there_P, 0))
    return ready_P


def _last_seen(masks: tuple[MaskSpec, ...], grid: VideoGrid, frame: int, other: int) -> np.ndarray:
    """The last cell of another frame that each cell of a frame sees in any layer, -1 where none: int64 [P]."""
    query, key, cells = np.array([[frame]]), np.array([[other]]), np.arange(grid.cells)
    seen_PP = np.zeros((grid.cells, grid.cells), dtype=bool)
    for mask in masks:
        seen_PP |= visible(mask, grid, query, cells[:, None], key, cells[None])
    return np.where(seen_PP.any(axis=1), grid.cells - 1 - seen_PP[:, ::-1].argmax(axis=1), -1)


def _steps(step_TP: np.ndarray, by_level: list[int], sampled: tuple[int, ...], grid: VideoGrid) -> tuple[Step, ...]:
    """The table of steps the other way round. Known frames that no sampled one comes after are never needed."""
    count = int(step_TP[list(sampled)].max(initial=-1)) + 1
    tokens: list[list[int]] = [[] for _ in range(count)]
    give: list[list[int]] = [[] for _ in range(count)]
    for frame in by_level:
        if frame in sampled:
            for cell, step in enumerate(step_TP[frame].tolist()):
                tokens[step].append(frame * grid.cells + cell)
        elif step_TP[frame, 0] < count:
            give[step_TP[frame, 0]].append(frame)
    return tuple(Step(tuple(frames), tuple(codes)) for frames, codes in zip(give, tokens, strict=True))


def _lanes(step_TP: np.ndarray, sampled: tuple[int, ...]) -> tuple[int, ...]:
    """Every sampled frame in the first lane that is free when it begins."""
    lane = [0] * len(step_TP)
    busy_until: list[int] = []
    for frame in sorted(sampled, key=lambda frame: int(step_TP[frame, 0])):
        begin, end = int(step_TP[frame, 0]), int(step_TP[frame, -1])
        free = (number for number, until in enumerate(busy_until) if until < begin)
        lane[frame] = next(free, len(busy_until))
        busy_until[lane[frame] :] = [end, *busy_until[lane[frame] + 1 :]]
    return tuple(lane)
