"""How tokens are cut into tiles so that few tiles hold visible pairs, and what a tile's mask needs.

Nothing is permuted in memory: a tile is a list of token rows. Two families of layouts:

- interval (spaces full, frame and shifted_window): tokens stand in order of (block, order position,
  cell), where blocks never see each other. Numbered by slot, the keys of a query are one interval
  of slots (two where a level holds several groups of frames).
- box (local3d): tiles are boxes of (order position, y, x). A token has one packed word, order
  position above y above x. Word order is the order of the rule, and the distance on every axis is
  checked by guard bits: with C = sum of (guard + radius) over the axes, both C + key - query and
  C + query - key have all guard bits set where every axis is near.

Either way a query sees a key where `near(key, point) & (key <= last)`, and in the general order
`near & (key < before | (first <= key & key <= last))`; `near` is `key >= point` for intervals.

Order positions number the frames by (level, group, frame); the open frames of a level form one
group and every other frame one of its own. Frames that are known together stand together, so that
fewer tiles are cut by the order.

Legend: T frames, P cells of a frame, F = T * P, n slots of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from math import prod

import numpy as np

from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid

Box = tuple[int, int, int]
"""Sides of a tile along order positions, y and x."""

NEVER = 2**31 - 1
"""Word of a padding key: above every `last`."""


@dataclass(frozen=True)
class Tiles:
    """Token rows of every tile."""

    rows: np.ndarray
    """int32 [tiles, n]; slots past the real tokens repeat the tile's last one."""
    count: np.ndarray
    """int32 [tiles]: how many slots hold tokens, the first ones of the tile."""

    @cached_property
    def real(self) -> np.ndarray:
        """bool [tiles, n]: slots that hold a token."""
        return np.arange(self.rows.shape[1]) < self.count[:, None]


@dataclass(frozen=True)
class BoxTest:
    """Constants of the packed distance check: (a & b & guards) == guards, a, b = constant +- (key - query)."""

    constant: int
    guards: int


@dataclass(frozen=True)
class Layout:
    """Both sides cut into tiles, what the mask needs per slot, and visible pairs of every pair of tiles."""

    query: Tiles
    key: Tiles
    words: np.ndarray
    """int32 [4, query tiles, n]: point, last, before, first of every query slot."""
    key_words: np.ndarray | None
    """int32 [key tiles, n]; None where a key's word is its slot number."""
    box: BoxTest | None
    visible: np.ndarray
    """int64 [query tiles, key tiles]: number of visible pairs."""

    @property
    def pairs(self) -> int:
        """Pairs of tiles that hold a visible pair of tokens."""
        return int(np.count_nonzero(self.visible))


@dataclass(frozen=True)
class Positions:
    """Frames in order of (level, group, frame). All int64 [T], indexed by frame."""

    position: np.ndarray
    before: np.ndarray
    """Positions below this one are of lower levels."""
    first: np.ndarray
    """First position of the frame's group."""
    last: np.ndarray
    """Last position of the frame's group."""
    simple: bool
    """Every level is one group: a frame sees the positions up to a last one."""


def positions(order: Order) -> Positions:
    """The frames' places in the order, and what each frame sees of it."""
    frames = range(len(order.level))
    groups = [(order.level[f], -1 if order.open[f] else f) for f in frames]
    ranked = sorted(frames, key=lambda f: (*groups[f], f))
    place = {frame: index for index, frame in enumerate(ranked)}
    members = {group: [place[f] for f in frames if groups[f] == group] for group in groups}
    before = [min(place[g] for g in frames if order.level[g] == order.level[f]) for f in frames]
    first = [min(members[groups[f]]) for f in frames]
    return Positions(
        position=np.array([place[f] for f in frames], dtype=np.int64),
        before=np.array(before, dtype=np.int64),
        first=np.array(first, dtype=np.int64),
        last=np.array([max(members[groups[f]]) for f in frames], dtype=np.int64),
        simple=before == first,
    )


def layout(
    mask: MaskSpec, grid: VideoGrid, tile_q: int, tile_k: int, queries: tuple[int, ...] | None = None
) -> Layout:
    """The layout with the fewest pairs of tiles to visit.

    Args:
        mask, grid: The rule.
        tile_q, tile_k: Slots of a tile.
        queries: Frames that ask, ascending; None = all. The rows of query tiles are then numbered among theirs.

    Raises:
        ValueError: The packed words of local3d do not fit into 31 bits.
    """
    asks = np.isin(np.arange(grid.frames), np.arange(grid.frames) if queries is None else queries)
    if mask.space.kind == "local3d":
        cut = _box_layout(mask, grid, tile_q, tile_k, asks)
    else:
        packed, padded = (_interval_layout(mask, grid, tile_q, tile_k, pad, asks) for pad in (False, True))
        cut = padded if padded.pairs < packed.pairs else packed
    number = np.cumsum(np.repeat(asks, grid.cells)) - 1
    return replace(cut, query=Tiles(number[cut.query.rows].astype(np.int32), cut.query.count))


# Interval layouts


def _blocks(space: Space, grid: VideoGrid) -> np.ndarray:
    """Number of the block of every token, int64 [F]: tokens of different blocks never see each other."""
    frame, cell = np.divmod(np.arange(grid.tokens), grid.cells)
    if space.kind == "full":
        return np.zeros_like(frame)
    if space.kind == "frame":
        return frame
    assert space.window is not None
    y, x = np.divmod(cell, grid.width)
    row = (y + space.shift[0]) // space.window[0]
    column = (x + space.shift[1]) // space.window[1]
    return np.unique(np.stack([row, column], axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def _interval_layout(
    mask: MaskSpec, grid: VideoGrid, tile_q: int, tile_k: int, pad: bool, asks: np.ndarray
) -> Layout:
    place = positions(mask.order)
    frame, cell = np.divmod(np.arange(grid.tokens), grid.cells)
    block = _blocks(mask.space, grid)

    def code(position: np.ndarray, at: np.ndarray | int) -> np.ndarray:
        return (block * grid.frames + position) * grid.cells + at

    codes = code(place.position[frame], cell)
    order = np.argsort(codes)
    sizes = np.bincount(block)
    asking = order[asks[frame[order]]]
    query = _block_tiles(asking, np.bincount(block[asking], minlength=len(sizes)), tile_q, pad)
    key = _block_tiles(order, sizes, tile_k, pad)
    shift = _block_starts(sizes, tile_k, pad) - _block_starts(sizes, 1, False)

    def slot(bound: np.ndarray) -> np.ndarray:
        return np.searchsorted(codes[order], bound) + shift[block]

    open_last = code(place.last[frame], grid.cells)
    last = slot(np.where(np.asarray(mask.order.open)[frame], open_last, codes + 1)) - 1
    first = slot(code(place.first[frame], 0))
    words = np.stack([slot(block * grid.tokens), last, slot(code(place.before[frame], 0)), first])
    tiles = words[:, query.rows].astype(np.int32)
    return Layout(query, key, tiles, None, None, _interval_counts(words, query, len(key.count), tile_k))


def _block_starts(sizes: np.ndarray, tile: int, pad: bool) -> np.ndarray:
    padded = -(-sizes // tile) * tile if pad else sizes
    return np.cumsum(padded) - padded


def _block_tiles(order: np.ndarray, sizes: np.ndarray, tile: int, pad: bool) -> Tiles:
    """Tiles over the tokens in `order`; with `pad` every block starts a tile of its own."""
    runs = np.split(order, np.cumsum(sizes)[:-1]) if pad else [order]
    pieces = [run[start : start + tile] for run in runs for start in range(0, len(run), tile)]
    return _tiles(pieces, tile)


def _tiles(pieces: list[np.ndarray], tile: int) -> Tiles:
    rows = np.stack([np.pad(piece, (0, tile - len(piece)), mode="edge") for piece in pieces])
    return Tiles(rows.astype(np.int32), np.array([len(piece) for piece in pieces], dtype=np.int32))


def _interval_counts(words: np.ndarray, query: Tiles, key_tiles: int, tile_k: int) -> np.ndarray:
    """Visible pairs of every pair of tiles, from the intervals [point, before) and [first, last] of each token."""
    edges = np.arange(key_tiles + 1) * tile_k
    point, last, before, first = words
    counts = np.zeros((len(query.count), key_tiles), dtype=np.int64)
    for index, (rows, count) in enumerate(zip(query.rows, query.count, strict=True)):
        own = rows[:count]
        for start, end in ((point, before), (first, last + 1)):
            seen = np.clip(edges - start[own, None], 0, (end - start)[own, None])
            counts[index] += np.diff(seen.sum(axis=0))
    return counts


# Box layouts


def _box_layout(mask: MaskSpec, grid: VideoGrid, tile_q: int, tile_k: int, asks: np.ndarray) -> Layout:
    fields = _fields(mask.space, grid)
    axes = _Axes(mask, grid, asks)
    query_box, key_box = _best_boxes(axes, tile_q, tile_k)
    pieces = [piece[asks[piece // grid.cells]] for piece in _box_pieces(axes, query_box)]
    asking = [index for index, piece in enumerate(pieces) if len(piece)]
    query = _tiles([pieces[index] for index in asking], tile_q)
    key = _tiles(_box_pieces(axes, key_box), tile_k)
    words = _box_words(mask, grid, fields)
    key_words = np.where(key.real, words[0, key.rows], NEVER).astype(np.int32)
    visible = axes.counts(query_box, key_box)[asking]
    return Layout(query, key, words[:, query.rows].astype(np.int32), key_words, fields.test, visible)


@dataclass(frozen=True)
class _Fields:
    """Where x, y, frame (only if the space limits frames) and order position stand in a word."""

    y: int
    frame: int | None
    position: int
    test: BoxTest


def _fields(space: Space, grid: VideoGrid) -> _Fields:
    assert space.window is not None
    radii = [(space.window[1] // 2, grid.width), (space.window[0] // 2, grid.height)]
    if space.frames is not None:
        radii.append((space.frames - 1, grid.frames))
    starts, constant, guards, shift = [], 0, 0, 0
    for radius, size in radii:
        radius = min(radius, size - 1)
        guard = 1 << (radius + size - 1).bit_length()
        starts.append(shift)
        constant += (guard + radius) << shift
        guards += guard << shift
        shift += guard.bit_length()
    if shift + (grid.frames - 1).bit_length() > 31 or constant >= 2**31:
        raise ValueError(f"grid {grid} with space {space}: its coordinates do not fit into 31 bits")
    return _Fields(starts[1], starts[2] if len(starts) > 2 else None, shift, BoxTest(constant, guards))


def _box_words(mask: MaskSpec, grid: VideoGrid, fields: _Fields) -> np.ndarray:
    """point, last, before and first of every token: int64 [4, F]."""
    place = positions(mask.order)
    frame, cell = np.divmod(np.arange(grid.tokens), grid.cells)
    y, x = np.divmod(cell, grid.width)
    point = (place.position[frame] << fields.position) + (y << fields.y) + x
    if fields.frame is not None:
        point += frame << fields.frame
    end = ((place.last[frame] + 1) << fields.position) - 1
    last = np.where(np.asarray(mask.order.open)[frame], end, point)
    return np.stack([point, last, place.before[frame] << fields.position, place.first[frame] << fields.position])


class _Axes:
    """The rule of local3d taken apart by axis: how many pairs of coordinates two segments hold.

    Frames that ask for nothing see nothing.
    """

    def __init__(self, mask: MaskSpec, grid: VideoGrid, asks: np.ndarray) -> None:
        space, place = mask.space, positions(mask.order)
        assert space.window is not None
        self.grid = grid
        self.frames = np.argsort(place.position)
        level, is_open = np.asarray(mask.order.level)[self.frames], np.asarray(mask.order.open)[self.frames]
        same = np.eye(grid.frames, dtype=bool)
        whole = level[None] < level[:, None]
        whole |= (level[None] == level[:, None]) & is_open & is_open[:, None]
        distance = abs(self.frames[:, None] - self.frames[None])
        near = distance < (grid.frames if space.frames is None else space.frames)
        near &= asks[self.frames, None]
        y, x = np.arange(grid.height), np.arange(grid.width)
        near_y = abs(y[:, None] - y) <= space.window[0] // 2
        near_x = abs(x[:, None] - x) <= space.window[1] // 2
        self.pairs = {
            "whole": whole & near,
            "own": same & ~whole & near,
            "y": near_y,
            "above": near_y & (y < y[:, None]),
            "row": near_y & (y == y[:, None]),
            "x": near_x,
            "left": near_x & (x <= x[:, None]),
        }
        # The search asks for the same sides again and again.
        self.count, self.touched = cache(self._count), cache(self._touched)

    def _count(self, name: str, side_q: int, side_k: int) -> np.ndarray:
        """Pairs of coordinates in every pair of segments, int64."""
        pairs = self.pairs[name].astype(np.int64)
        rows = np.add.reduceat(pairs, np.arange(0, pairs.shape[0], side_q), axis=0)
        return np.add.reduceat(rows, np.arange(0, pairs.shape[1], side_k), axis=1)

    def _touched(self, side_q: int, side_k: int, *names: str, but: str = "") -> int:
        """Pairs of segments that hold a pair of every name, and none of `but`."""
        held = np.logical_and.reduce([self.count(name, side_q, side_k) > 0 for name in names])
        return int(np.count_nonzero(held & (self.count(but, side_q, side_k) == 0) if but else held))

    def executed(self, q: Box, k: Box) -> int:
        """Pairs of boxes that hold a visible pair."""
        whole = self.touched(q[0], k[0], "whole")
        own = self.touched(q[0], k[0], "own", but="whole")
        near_x = self.touched(q[2], k[2], "x")
        past = self.touched(q[1], k[1], "above") * near_x
        past += self.touched(q[1], k[1], "row") * self.touched(q[2], k[2], "left")
        past -= self.touched(q[1], k[1], "above", "row") * self.touched(q[2], k[2], "x", "left")
        return whole * self.touched(q[1], k[1], "y") * near_x + own * past

    def counts(self, q: Box, k: Box) -> np.ndarray:
        """Visible pairs of every pair of boxes, int64 [query boxes, key boxes]."""
        t, y, x = ((q[axis], k[axis]) for axis in range(3))
        whole = np.kron(self.count("y", *y), self.count("x", *x))
        past = np.kron(self.count("above", *y), self.count("x", *x))
        past += np.kron(self.count("row", *y), self.count("left", *x))
        return np.kron(self.count("whole", *t), whole) + np.kron(self.count("own", *t), past)


def _best_boxes(axes: _Axes, tile_q: int, tile_k: int) -> tuple[Box, Box]:
    sides = (axes.grid.frames, axes.grid.height, axes.grid.width)
    candidates = product(_boxes(sides, tile_q), _boxes(sides, tile_k))
    return min(candidates, key=lambda pair: (axes.executed(*pair), pair))


def _boxes(sides: tuple[int, int, int], tile: int) -> list[Box]:
    """Boxes of at most `tile` tokens that waste little of it."""
    t, y, x = sides
    boxes = [(d, h, min(tile // (d * h), x)) for d, h in product(range(1, t + 1), range(1, y + 1)) if d * h <= tile]
    best = max(prod(box) for box in boxes)
    return [box for box in boxes if prod(box) >= best - best // 8]


def _box_pieces(axes: _Axes, box: Box) -> list[np.ndarray]:
    """Tokens of every box."""
    grid = axes.grid
    tokens = np.arange(grid.tokens).reshape(grid.frames, grid.height, grid.width)[axes.frames]
    starts = product(*(range(0, size, side) for size, side in zip(tokens.shape, box, strict=True)))
    slices = (tuple(slice(a, a + side) for a, side in zip(start, box, strict=True)) for start in starts)
    return [tokens[cut].ravel() for cut in slices]
