"""Tile plans as tensors on a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from megacog_kernels.attention.plan import TilePlan, Visits, tile_plan
from megacog_kernels.grid import MaskSpec, VideoGrid


@dataclass(frozen=True)
class Tables:
    """One plan on one device; int32 tensors, laid out as in `TilePlan`."""

    plan: TilePlan
    query_rows: Tensor
    query_count: Tensor
    words: Tensor
    key_rows: Tensor
    key_count: Tensor
    key_words: Tensor
    """Empty where a key's word is its slot number."""
    by_query: dict[str, Tensor]
    """order, start, partial, end and visited of the plan's visits."""
    by_key: dict[str, Tensor]
    contiguous: bool
    """Slots of both sides are rows of memory, so that kernels read no lists of rows."""


@cache  # never forgotten: a captured CUDA graph reads them
def tables(
    mask: MaskSpec, grid: VideoGrid, tile_q: int, tile_k: int, device: torch.device,
    queries: tuple[int, ...] | None = None,
) -> Tables:  # fmt: skip
    """The tables of `tile_plan`, kept for the next call."""
    plan = tile_plan(mask, grid, tile_q, tile_k, queries)

    def to(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(device)

    def visits(side: Visits) -> dict[str, Tensor]:
        arrays = {"order": side.order, "start": side.start, "partial": side.partial, "end": side.end}
        return {name: to(array) for name, array in arrays.items()} | {"visited": to(side.tiles)}

    return Tables(
        plan=plan,
        query_rows=to(plan.query.rows),
        query_count=to(plan.query.count),
        words=to(plan.words),
        key_rows=to(plan.key.rows),
        key_count=to(plan.key.count),
        key_words=to(plan.key_words if plan.key_words is not None else np.zeros(1)),
        by_query=visits(plan.by_query),
        by_key=visits(plan.by_key),
        contiguous=_contiguous(plan),
    )


def _contiguous(plan: TilePlan) -> bool:
    """Only where the rest is plain, too: every further combination is a kernel more to compile."""
    sides = (plan.query.rows.ravel(), plan.key.rows.ravel())
    in_order = all(np.array_equal(rows, np.minimum(np.arange(rows.size), rows.max())) for rows in sides)
    return in_order and plan.simple and plan.box is None
