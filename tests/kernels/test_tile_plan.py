"""Tile plans against the dense mask, and their counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import masks

from megacog_kernels.attention.layout import Tiles
from megacog_kernels.attention.plan import TilePlan, Visits, dense_executed, tile_plan
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid, dense_mask

REPORT = Path(__file__).parents[2] / "kernels/benchmarks/tile_plan.py"
GRID = VideoGrid(5, 20, 20)


def partial_tile(plan: TilePlan, query_tile: int, key_tile: int) -> np.ndarray:
    """The mask that a kernel computes in a partial tile, from the plan's words: bool [tile_q, tile_k]."""
    point, last, before, first = plan.words[:, query_tile, :, None].astype(np.int64)
    if plan.key_words is None:
        key = key_tile * plan.tile_k + np.arange(plan.tile_k)[None]
    else:
        key = plan.key_words[key_tile].astype(np.int64)[None]
    if plan.box is None:
        near = key >= point
    else:
        constant, guards = plan.box.constant, plan.box.guards
        near = ((constant + (key - point)) & (constant - (key - point)) & guards) == guards
    ordered = key <= last if plan.simple else (key < before) | ((first <= key) & (key <= last))
    return near & ordered


def dense(plan: TilePlan, visits: Visits, by_key: bool) -> np.ndarray:
    """What a kernel that walks one direction of the plan sees, bool [F, F]; every pair at most once."""
    queries, keys = (int(side.rows.max()) + 1 for side in (plan.query, plan.key))
    seen = np.zeros((queries, keys), dtype=np.int64)
    for own, (start, partial, end) in enumerate(zip(visits.start, visits.partial, visits.end, strict=True)):
        for entry in range(start, end):
            other = visits.tiles[entry]
            query_tile, key_tile = (other, own) if by_key else (own, other)
            allowed = partial_tile(plan, query_tile, key_tile)
            real = plan.query.real[query_tile][:, None] & plan.key.real[key_tile]
            if entry < partial:
                assert plan.key.real[key_tile].all(), "a full tile has padding keys"
                assert (allowed | ~real).all(), "a full tile holds an invisible pair"
            pairs = np.ix_(plan.query.rows[query_tile], plan.key.rows[key_tile])
            np.add.at(seen, pairs, allowed & plan.query.real[query_tile][:, None])
            assert (allowed & real).any(), "a visited tile holds no visible pair"
    assert seen.max() <= 1, "a pair is visited twice"
    return seen.astype(bool)


def covers_every_token_once(tiles: Tiles, tokens: int) -> bool:
    return np.array_equal(np.sort(tiles.rows[tiles.real]), np.arange(tokens))


@settings(max_examples=150, deadline=None)
@given(masks(), st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16]), st.data())
def test_both_directions_of_a_plan_are_the_mask(
    case: tuple[MaskSpec, VideoGrid], tile_q: int, tile_k: int, data: st.DataObject
) -> None:
    mask, grid = case
    frames = st.lists(st.integers(0, grid.frames - 1), min_size=1, unique=True)
    queries = data.draw(st.none() | frames.map(sorted).map(tuple))
    plan = tile_plan(mask, grid, tile_q, tile_k, queries)
    asking = [frame * grid.cells + cell for frame in queries or range(grid.frames) for cell in range(grid.cells)]
    assert covers_every_token_once(plan.query, len(asking))
    assert covers_every_token_once(plan.key, grid.tokens)
    expected = dense_mask(mask, grid)[asking]
    np.testing.assert_array_equal(dense(plan, plan.by_query, by_key=False), expected)
    np.testing.assert_array_equal(dense(plan, plan.by_key, by_key=True), expected)
    assert plan.visible == expected.sum()
    for visits in (plan.by_query, plan.by_key):
        lengths = (visits.end - visits.start)[visits.order]
        assert sorted(visits.order) == list(range(len(lengths)))
        assert (np.diff(lengths) <= 0).all(), "longer lists come first"


def window_plan(order: Order, shift: int, tile_q: int) -> TilePlan:
    space = Space("shifted_window", (10, 10), shift=(shift, shift))
    return tile_plan(MaskSpec(order, space), GRID, tile_q, 64)


@pytest.mark.parametrize(
    ("order", "shift", "tile_q", "share", "ratio"),
    [
        (Order.interpolation(5), 0, 64, 0.91, 2.59),
        (Order.interpolation(5), 5, 64, 0.85, 3.84),
        (Order.interpolation(5), 0, 128, 0.88, 2.57),
        (Order.interpolation(5), 5, 128, 0.82, 3.79),
        (Order.sequential(5), 0, 64, 0.87, 3.18),
        (Order.sequential(5), 5, 64, 0.83, 4.67),
    ],
)
def test_shifted_windows_waste_little(order: Order, shift: int, tile_q: int, share: float, ratio: float) -> None:
    plan = window_plan(order, shift, tile_q)
    assert (plan.visible + 2000 * 64) / plan.executed(64) >= share
    assert dense_executed(GRID, 64, tile_q, 64) / plan.executed(64) >= ratio - 0.01


@pytest.mark.parametrize(
    ("grid", "window", "share"),
    [(VideoGrid(16, 32, 32), 9, 0.49), (VideoGrid(16, 32, 32), 17, 0.61), (VideoGrid(32, 60, 60), 17, 0.65)],
)
def test_local_windows_waste_little(grid: VideoGrid, window: int, share: float) -> None:
    plan = tile_plan(MaskSpec(Order.sequential(grid.frames), Space("local3d", (window, window))), grid, 64, 64)
    assert (plan.visible + grid.tokens * 64) / plan.executed(64) >= share


def test_dense_causal_and_own_frames_stay_in_raster_order() -> None:
    for space, pairs in ((Space(), 528), (Space("frame"), 137)):
        plan = tile_plan(MaskSpec(Order.sequential(5), space), GRID, 64, 64)
        assert plan.pairs == pairs
        np.testing.assert_array_equal(plan.key.rows.ravel()[:2000], np.arange(2000))


def test_coordinates_that_do_not_fit_are_refused() -> None:
    mask = MaskSpec(Order.sequential(2), Space("local3d", (3, 3), 2))
    with pytest.raises(ValueError, match="do not fit"):
        tile_plan(mask, VideoGrid(2, 2**15, 2**15), 64, 64)


@pytest.mark.parametrize("grid", [VideoGrid(0, 4, 4), VideoGrid(1, 0, 4)])
def test_a_grid_without_tokens_has_no_plan(grid: VideoGrid) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        tile_plan(MaskSpec(Order.sequential(grid.frames), Space()), grid, 64, 64)


def test_an_order_of_other_length_is_refused() -> None:
    with pytest.raises(ValueError, match="covers 3 frames"):
        tile_plan(MaskSpec(Order.sequential(3), Space()), GRID, 64, 64)


def test_the_report_prints_rows_for_machines() -> None:
    command = [sys.executable, str(REPORT), "--json", "--grid", "5x20x20"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [json.loads(line) for line in printed.splitlines()]
    keys = "grid text levels open space window shift tile_q tile_k useful executed dense_executed".split()
    assert all(list(row) == keys and row["grid"] == [5, 20, 20] for row in rows)
    full = next(row for row in rows if row["space"] == "full")
    assert (full["useful"], full["executed"], full["dense_executed"]) == (2_129_000, 2_293_760, 2_293_760)
