"""Which key tiles every query tile visits, and the other way round.

A plan depends on mask, grid and tile sizes only, so it is made once per layer kind and shared by
all heads and samples. Kernels walk its lists; they never look at a pair of tiles without a visible
pair, and evaluate the mask in partial tiles only. Text keys are no part of it: every query sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megacog_kernels.attention.layout import BoxTest, Tiles, layout, positions
from megacog_kernels.grid import MaskSpec, VideoGrid


@dataclass(frozen=True)
class Visits:
    """Tiles that each tile of one side visits on the other, full ones first; all int32."""

    order: np.ndarray
    """[tiles]: the tiles, longest visits first: the order in which programs should take them."""
    start: np.ndarray
    """[tiles]: first entry of each tile in `tiles`."""
    partial: np.ndarray
    """[tiles]: first entry of its partial tiles."""
    end: np.ndarray
    """[tiles]: behind its last entry."""
    tiles: np.ndarray
    """[entries]: numbers of the visited tiles, ascending within full and within partial ones."""


@dataclass(frozen=True)
class TilePlan:
    """Tiles of both sides, their visits in both directions, and what partial tiles need."""

    tile_q: int
    tile_k: int
    query: Tiles
    key: Tiles
    by_query: Visits
    by_key: Visits
    words: np.ndarray
    """int32 [4, query tiles, tile_q]: point, last, before, first of every query slot (see layout.py)."""
    key_words: np.ndarray | None
    """int32 [key tiles, tile_k]; None where a key's word is its slot number."""
    box: BoxTest | None
    simple: bool
    """`point` and `last` decide; `before` and `first` are needed otherwise."""
    visible: int
    """Visible pairs of frame tokens."""

    @property
    def pairs(self) -> int:
        """Pairs of tiles that are visited."""
        return len(self.by_query.tiles)

    def executed(self, text: int) -> int:
        """Score elements per head that kernels compute, padding and `text` keys included."""
        text_columns = -(-text // self.tile_k) * self.tile_k
        return self.pairs * self.tile_q * self.tile_k + self.query.rows.size * text_columns


@lru_cache(maxsize=128)
def tile_plan(
    mask: MaskSpec, grid: VideoGrid, tile_q: int, tile_k: int, queries: tuple[int, ...] | None = None
) -> TilePlan:
    """The plan of one mask on one grid; of the frames `queries` only, where not all ask (see layout.py).

    Raises:
        ValueError: The grid has no tokens, or the order does not cover its frames.
    """
    if grid.tokens < 1:
        raise ValueError(f"grid {grid} has no tokens")
    if len(mask.order.level) != grid.frames:
        raise ValueError(f"the order covers {len(mask.order.level)} frames, the grid has {grid.frames}")
    cut = layout(mask, grid, tile_q, tile_k, queries)
    full = cut.visible == cut.query.count[:, None].astype(np.int64) * tile_k
    partial = (cut.visible > 0) & ~full
    return TilePlan(
        tile_q=tile_q,
        tile_k=tile_k,
        query=cut.query,
        key=cut.key,
        by_query=_visits(full, partial),
        by_key=_visits(full.T, partial.T),
        words=cut.words,
        key_words=cut.key_words,
        box=cut.box,
        simple=positions(mask.order).simple or mask.space.kind == "frame",
        visible=int(cut.visible.sum()),
    )


def _visits(full: np.ndarray, partial: np.ndarray) -> Visits:
    """Lists from two bool matrices [tiles, visited tiles]."""
    rows = zip(full, partial, strict=True)
    entries = [np.flatnonzero(kind) for row in rows for kind in row]
    ends = np.cumsum([len(entry) for entry in entries])
    start = np.concatenate([[0], ends[1:-1:2]])
    return Visits(
        order=np.argsort(start - ends[1::2], kind="stable").astype(np.int32),
        start=start.astype(np.int32),
        partial=ends[::2].astype(np.int32),
        end=ends[1::2].astype(np.int32),
        tiles=np.concatenate(entries).astype(np.int32),
    )


def dense_executed(grid: VideoGrid, text: int, tile_q: int, tile_k: int) -> int:
    """Score elements per head of a kernel for dense causal attention in raster order, `text` keys included."""
    starts = np.arange(0, grid.tokens, tile_q)
    key_tiles = -(-np.minimum(starts + tile_q, grid.tokens) // tile_k)
    text_tiles = -(-text // tile_k) * len(starts)
    return int(key_tiles.sum() + text_tiles) * tile_q * tile_k
