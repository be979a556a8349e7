"""Which frame keys a frame query sees: one rule, written once.

The dense reference mask, the tile plan of the kernels and the key lists of the decode cache are all
derived from `visible`. A query also sees every valid text key; that part needs no rule.

Shapes: T frames, H and W cells of the grid, P = H * W cells of one frame in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

SpaceKind = Literal["full", "frame", "local3d", "shifted_window"]


@dataclass(frozen=True)
class VideoGrid:
    """Frames and cells of one sequence."""

    frames: int
    height: int
    width: int

    @property
    def cells(self) -> int:
        """Cells of one frame."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Cells of all frames."""
        return self.frames * self.cells


@dataclass(frozen=True)
class Order:
    """In which order frames come to be known.

    A frame sees frames of a lower level, and itself up to the current cell. Open frames (known in
    advance) also see themselves and the open frames of their level whole.
    """

    level: tuple[int, ...]
    open: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.level) != len(self.open):
            raise ValueError(f"level has {len(self.level)} frames, open has {len(self.open)}")

    @staticmethod
    def sequential(frames: int) -> Order:
        """Frame after frame: levels 0, 1, 2, ..., none open."""
        return Order(tuple(range(frames)), (False,) * frames)

    @staticmethod
    def interpolation(frames: int) -> Order:
        """Even frames are known and open; odd frames follow one after the other."""
        if frames % 2 == 0:
            raise ValueError(f"interpolation needs an odd number of frames, not {frames}")
        level = tuple(0 if frame % 2 == 0 else frame // 2 + 1 for frame in range(frames))
        return Order(level, tuple(frame % 2 == 0 for frame in range(frames)))


@dataclass(frozen=True)
class Space:
    """Which cells of an allowed frame are near enough.

    full: all. frame: own frame only. local3d: fewer than `frames` frames away (None = any) and at
    most window // 2 cells away on each axis. shifted_window: same block of `window` cells on both
    axes after adding `shift`.
    """

    kind: SpaceKind = "full"
    window: tuple[int, int] | None = None
    frames: int | None = None
    shift: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if (self.window is None) == (self.kind in ("local3d", "shifted_window")):
            raise ValueError(f"space {self.kind!r} and window {self.window} do not go together")
        if self.window is not None and min(self.window) < 1:
            raise ValueError(f"window {self.window} of space {self.kind!r} has a side below 1")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"space {self.kind!r} sees {self.frames} frames; 1 is its own frame only")


@dataclass(frozen=True)
class MaskSpec:
    """Order and space of one attention layer."""

    order: Order
    space: Space


def visible(mask: MaskSpec, grid: VideoGrid, query_frame: Any, query_cell: Any, key_frame: Any, key_cell: Any) -> Any:
    """Whether a query sees a key, as a bool array of the broadcast shape of the four index arrays.

    Args:
        mask: The rule's parameters; `mask.order` covers `grid.frames` frames.
        grid: The video grid.
        query_frame, query_cell, key_frame, key_cell: int numpy arrays, cells in raster order.
    """
    if len(mask.order.level) != grid.frames:
        raise ValueError(f"the order covers {len(mask.order.level)} frames, the grid has {grid.frames}")
    order = (np.asarray(mask.order.level), np.asarray(mask.order.open))
    return rule(mask.space, grid, *order, query_frame, query_cell, key_frame, key_cell)


def rule(
    space: Space, grid: VideoGrid, level: Any, is_open: Any, query_frame: Any, query_cell: Any, key_frame: Any,
    key_cell: Any,
) -> Any:  # fmt: skip
    """`visible` with the order as arrays; all arrays of numpy, or all tensors of torch."""
    same_frame = query_frame == key_frame
    lower = level[key_frame] < level[query_frame]
    own = same_frame & (is_open[query_frame] | (key_cell <= query_cell))
    peers = ~same_frame & (level[key_frame] == level[query_frame]) & is_open[query_frame] & is_open[key_frame]
    return (lower | own | peers) & _near(space, grid, query_frame, query_cell, key_frame, key_cell)


def _near(space: Space, grid: VideoGrid, query_frame: Any, query_cell: Any, key_frame: Any, key_cell: Any) -> Any:
    if space.kind == "full":
        return True
    if space.kind == "frame":
        return query_frame == key_frame
    query_y, query_x = query_cell // grid.width, query_cell % grid.width
    key_y, key_x = key_cell // grid.width, key_cell % grid.width
    assert space.window is not None
    height, width = space.window
    if space.kind == "local3d":
        near = (abs(query_y - key_y) <= height // 2) & (abs(query_x - key_x) <= width // 2)
        return near if space.frames is None else near & (abs(query_frame - key_frame) < space.frames)
    shift_y, shift_x = space.shift
    same_row = (query_y + shift_y) // height == (key_y + shift_y) // height
    same_column = (query_x + shift_x) // width == (key_x + shift_x) // width
    return same_row & same_column


def dense_mask(mask: MaskSpec, grid: VideoGrid) -> np.ndarray:
    """The rule over all pairs of frame tokens: bool [T*P, T*P], rows are queries."""
    frame, cell = np.divmod(np.arange(grid.tokens), grid.cells)
    return np.broadcast_to(
        visible(mask, grid, frame[:, None], cell[:, None], frame[None], cell[None]), (grid.tokens, grid.tokens)
    )


def visible_keys(mask: MaskSpec, grid: VideoGrid, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Frame tokens that any of the query tokens sees, ascending int64 [K]; and which each of them sees, bool [R, K].

    Tokens are numbered frame * P + cell.
    """
    query_frame, query_cell = np.divmod(np.asarray(tokens)[:, None], grid.cells)
    key_frame, key_cell = np.divmod(np.arange(grid.tokens), grid.cells)
    rule = visible(mask, grid, query_frame, query_cell, key_frame, key_cell)
    allowed_RF = np.broadcast_to(rule, (len(tokens), grid.tokens))
    keys_K = np.flatnonzero(allowed_RF.any(axis=0))
    return keys_K, allowed_RF[:, keys_K]
