"""The mask rule against the facts of the release and against its own other forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from kernel_cases import masks

from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid, dense_mask, visible_keys

GRID = VideoGrid(5, 20, 20)


def swin(order: Order, shift: int) -> MaskSpec:
    return MaskSpec(order, Space("shifted_window", (10, 10), shift=(shift, shift)))


@pytest.mark.parametrize(
    ("order", "shift", "mean"),
    [
        (Order.sequential(5), 0, 250.5),
        (Order.sequential(5), 5, 141.125),
        (Order.interpolation(5), 0, 340.2),
        (Order.interpolation(5), 5, 191.45),
    ],
)
def test_mean_visible_keys_equal_the_release(order: Order, shift: int, mean: float) -> None:
    assert dense_mask(swin(order, shift), GRID).sum(axis=1).mean() == pytest.approx(mean, abs=1e-9)


def test_full_causal_sees_1000_keys_on_average() -> None:
    assert dense_mask(MaskSpec(Order.sequential(5), Space()), GRID).sum(axis=1).mean() == 1000.5


def test_interpolation_order_is_the_table_of_the_release() -> None:
    """Even queries see even frames whole; odd ones see even frames, earlier odd frames and their own past."""
    grid = VideoGrid(5, 2, 2)
    frame, cell = np.divmod(np.arange(grid.tokens), grid.cells)
    tq, tk, pq, pk = frame[:, None], frame[None], cell[:, None], cell[None]
    even_q, even_k = tq % 2 == 0, tk % 2 == 0
    table = (even_q & even_k) | (~even_q & (even_k | (tk < tq) | ((tk == tq) & (pk <= pq))))
    np.testing.assert_array_equal(dense_mask(MaskSpec(Order.interpolation(5), Space()), grid), table)


def need(cell: int) -> int:
    """Latest cell of frame t that cell `cell` of frame t + 1 depends on, through any depth, base channel included."""
    grid = VideoGrid(2, 20, 20)
    masks = [dense_mask(swin(Order.sequential(2), shift), grid) for shift in (0, 5)]
    step = masks[0] | masks[1] | dense_mask(MaskSpec(Order.sequential(2), Space("frame")), grid)
    reached = np.zeros(grid.tokens, dtype=bool)
    reached[grid.cells + cell] = True
    while True:
        grown = reached | step[reached].any(axis=0)
        if (grown == reached).all():
            return int(np.flatnonzero(reached[: grid.cells]).max())
        reached = grown


@pytest.mark.parametrize(("cell", "latest"), [(0, 189), (10, 199), (100, 284), (115, 299), (200, 389), (210, 399)])
def test_dependence_between_frames_matches_the_release(cell: int, latest: int) -> None:
    assert need(cell) == latest


def scalar_rule(mask: MaskSpec, grid: VideoGrid, f: int, p: int, g: int, q: int) -> bool:
    """The rule of the design in plain Python, one pair at a time."""
    level, is_open, space = mask.order.level, mask.order.open, mask.space
    if g == f:
        ordered = is_open[f] or q <= p
        ordered = ordered or level[g] < level[f]
    else:
        ordered = level[g] < level[f] or (level[g] == level[f] and is_open[f] and is_open[g])
    (y, x), (v, u) = divmod(p, grid.width), divmod(q, grid.width)
    if space.kind == "full":
        near = True
    elif space.kind == "frame":
        near = f == g
    else:
        assert space.window
        h, w = space.window
        if space.kind == "local3d":
            near = abs(y - v) <= h // 2 and abs(x - u) <= w // 2
            near = near and (space.frames is None or abs(f - g) < space.frames)
        else:
            sy, sx = space.shift
            near = (y + sy) // h == (v + sy) // h and (x + sx) // w == (u + sx) // w
    return ordered and near


@settings(max_examples=50)
@given(masks())
def test_dense_mask_and_key_lists_follow_the_rule(case: tuple[MaskSpec, VideoGrid]) -> None:
    mask, grid = case
    dense = dense_mask(mask, grid)
    for token in range(grid.tokens):
        frame, cell = divmod(token, grid.cells)
        expected = [scalar_rule(mask, grid, frame, cell, *divmod(key, grid.cells)) for key in range(grid.tokens)]
        np.testing.assert_array_equal(dense[token], expected)
        np.testing.assert_array_equal(visible_keys(mask, grid, [token])[0], np.flatnonzero(expected))
    several = list(range(0, grid.tokens, 2))
    keys, allowed = visible_keys(mask, grid, several)
    np.testing.assert_array_equal(keys, np.flatnonzero(dense[several].any(axis=0)))
    np.testing.assert_array_equal(allowed, dense[several][:, keys])


def test_an_even_number_of_frames_cannot_interpolate() -> None:
    with pytest.raises(ValueError, match="odd"):
        Order.interpolation(4)
