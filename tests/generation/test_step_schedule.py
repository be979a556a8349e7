"""Steps of several codes: as few as a search over the whole mask finds, on any order table and space."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacog.generation.schedule import schedule
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid, dense_mask

OWN = Space("frame")
FULL = Space()


def windows(side: int, shift: int) -> Space:
    return Space("shifted_window", (side, side), None, (shift, shift))


def masks(order: Order, *spaces: Space) -> tuple[MaskSpec, ...]:
    return tuple(MaskSpec(order, space) for space in (OWN, *spaces))


def searched(all_masks: tuple[MaskSpec, ...], grid: VideoGrid, known: set[int]) -> list[set[int]]:
    """Steps by trying, from the dense masks: in every step all codes that see nothing that is not in the caches."""
    seen_FF = np.logical_or.reduce([dense_mask(mask, grid) for mask in all_masks])
    np.fill_diagonal(seen_FF, False)
    P, there = grid.cells, np.zeros(grid.tokens, dtype=bool)
    groups: dict[tuple[int, int], list[int]] = {}
    for frame in sorted(known):
        is_open = all_masks[0].order.open[frame]
        groups.setdefault((all_masks[0].order.level[frame], -1 if is_open else frame), []).append(frame)
    cells_of = [np.concatenate([np.arange(f * P, f * P + P) for f in frames]) for frames in groups.values()]
    next_cell = {frame: 0 for frame in range(grid.frames) if frame not in known}
    steps: list[set[int]] = []
    while any(cell < P for cell in next_cell.values()):
        for _ in cells_of:  # one given group may wait for another
            for cells in cells_of:
                if not (seen_FF[cells] & ~there & ~np.isin(np.arange(grid.tokens), cells)).any():
                    there[cells] = True
        ready = [frame * P + cell for frame, cell in next_cell.items() if cell < P]
        step = {token for token in ready if not (seen_FF[token] & ~there).any()}
        assert step, "nothing can be sampled"
        for token in step:
            there[token] = True
            next_cell[token // P] += 1
        steps.append(step)
    return steps


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[MaskSpec, ...], VideoGrid, set[int]]:
    frames = draw(st.integers(1, 5))
    grid = VideoGrid(frames, draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    level = tuple(draw(st.integers(0, 3)) for _ in range(frames))
    known = {frame for frame in range(frames) if draw(st.booleans())}
    is_open = tuple(frame in known and draw(st.booleans()) for frame in range(frames))
    side, shift = st.integers(1, 4), st.integers(0, 3)
    space = st.one_of(
        st.just(FULL),
        st.builds(lambda h, w, y, x: Space("shifted_window", (h, w), None, (y, x)), side, side, shift, shift),
        st.builds(lambda h, w, t: Space("local3d", (h, w), t), side, side, st.none() | st.integers(1, 3)),
    )
    return masks(Order(level, is_open), *draw(st.lists(space, max_size=3))), grid, known


@given(cases())
def test_the_steps_are_those_that_a_search_over_the_masks_finds(
    case: tuple[tuple[MaskSpec, ...], VideoGrid, set[int]],
) -> None:
    all_masks, grid, known = case
    found = schedule(all_masks, grid, frozenset(known))
    assert [set(step.tokens) for step in found.steps] == searched(all_masks, grid, known)
    assert sorted(token // grid.cells for step in found.steps for token in step.tokens) == sorted(
        frame for frame in found.frames for _ in range(grid.cells)
    )
    assert_given_in_time(all_masks, grid, known)
    assert_lanes_are_apart(all_masks, grid, known)


def assert_given_in_time(all_masks: tuple[MaskSpec, ...], grid: VideoGrid, known: set[int]) -> None:
    """When a row is fed, sampled or given, everything that it sees is in the caches, and nothing comes twice."""
    seen_FF = np.logical_or.reduce([dense_mask(mask, grid) for mask in all_masks])
    there = np.zeros(grid.tokens, dtype=bool)
    order = all_masks[0].order
    for step in schedule(all_masks, grid, frozenset(known)).steps:
        for level in sorted({order.level[frame] for frame in step.give}):  # as Decoder.give takes them
            cells = [f * grid.cells + p for f in step.give if order.level[f] == level for p in range(grid.cells)]
            assert not there[cells].any()
            there[cells] = True
            assert not (seen_FF[cells] & ~there).any()
        there[list(step.tokens)] = True
        assert not (seen_FF[list(step.tokens)] & ~there).any()


def assert_lanes_are_apart(all_masks: tuple[MaskSpec, ...], grid: VideoGrid, known: set[int]) -> None:
    found = schedule(all_masks, grid, frozenset(known))
    spans: dict[int, list[tuple[int, int]]] = {}
    for frame in found.frames:
        at = [index for index, step in enumerate(found.steps) for token in step.tokens if token // grid.cells == frame]
        spans.setdefault(found.lane[frame], []).append((at[0], at[-1]))
    for in_lane in spans.values():
        assert all(end < begin for (_, end), (begin, _) in pairwise(sorted(in_lane)))


def test_blocks_of_the_release_take_590_steps_instead_of_800() -> None:
    grid = VideoGrid(5, 20, 20)
    both = (windows(10, 0), windows(10, 5))
    block = schedule(masks(Order.interpolation(5), *both), grid, frozenset({0, 2, 4}))
    assert len(block.steps) == 590 and block.width == 2 and block.lanes == 2
    assert block.steps[0].give == (0, 2, 4)
    assert len(schedule(masks(Order.sequential(5), *both), grid, frozenset()).steps) == 1160
    assert len(schedule(masks(Order.sequential(5), *both), grid, frozenset({0})).steps) == 970
    # One of the two alone hides more; without attention-plus the frames know nothing of each other.
    assert len(schedule(masks(Order.interpolation(5), both[0]), grid, frozenset({0, 2, 4})).steps) == 590
    assert len(schedule(masks(Order.interpolation(5)), grid, frozenset({0, 2, 4})).steps) == 400


def test_full_attention_samples_one_code_after_the_other() -> None:
    grid = VideoGrid(5, 20, 20)
    plain = schedule(masks(Order.sequential(5), FULL), grid, frozenset({0}))
    assert [step.tokens for step in plain.steps] == [(token,) for token in range(400, 2000)]
    assert [step.give for step in plain.steps if step.give] == [(0,)]
    assert plain.width == plain.lanes == 1


def test_frames_of_one_level_that_are_not_open_come_together() -> None:
    both = schedule(masks(Order((0, 0), (False, False)), FULL), VideoGrid(2, 2, 3), frozenset())
    assert [step.tokens for step in both.steps] == [(cell, 6 + cell) for cell in range(6)]


def test_frames_are_numbered_by_level_and_unknown_open_ones_are_refused() -> None:
    grid = VideoGrid(3, 1, 2)
    found = schedule(masks(Order((2, 0, 1), (False, True, False)), FULL), grid, frozenset({1}))
    assert found.frames == (2, 0)
    with pytest.raises(ValueError, match=r"frames \[2\] are open"):
        schedule(masks(Order.interpolation(5), FULL), VideoGrid(5, 1, 2), frozenset({0, 4}))


def test_a_known_frame_that_sees_unknown_ones_waits_for_them_and_an_unneeded_one_is_never_given() -> None:
    grid = VideoGrid(3, 1, 2)
    middle = schedule(masks(Order.sequential(3), FULL), grid, frozenset({1}))
    assert [(step.give, step.tokens) for step in middle.steps] == [((), (0,)), ((), (1,)), ((1,), (4,)), ((), (5,))]
    last = schedule(masks(Order.sequential(3), FULL), grid, frozenset({2}))
    assert all(step.give == () for step in last.steps) and len(last.steps) == 4
