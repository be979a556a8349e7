"""Decoding: a few new tokens against static buffers of keys and values.

Positions are read on the device and shapes never change, so that one captured CUDA graph serves
every step. Shares of a token's keys are joined in the same order in every run.

Legend: B batch, L text length, F frame tokens, S = L + F slots of a buffer, R new tokens per sample,
N heads, M key heads, D head dim.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megacog_kernels.attention.plan import tile_plan
from megacog_kernels.attention.tables import Tables, tables
from megacog_kernels.grid import MaskSpec, VideoGrid

TILE_Q, TILE_K = 16, 64


@lru_cache(maxsize=128)
def _slot_of(mask: MaskSpec, grid: VideoGrid, device: torch.device) -> Tensor:
    """Slot of every frame token among the queries of the plan: int32 [F]."""
    query = tile_plan(mask, grid, TILE_Q, TILE_K).query
    slots = np.empty(grid.tokens, dtype=np.int32)
    slots[query.rows[query.real]] = np.flatnonzero(query.real)
    return torch.from_numpy(slots).to(device)


def decode(
    q: Tensor, k: Tensor, v: Tensor, text_valid: Tensor, tokens: Tensor, mask: MaskSpec, grid: VideoGrid,
    scale: float, splits: int,
) -> Tensor:  # fmt: skip
    """See `decode_attention` of ops.py, which checks the arguments."""
    from megacog_kernels.attention.decode_kernels import decode_join, decode_partial

    B, R, N, D = q.shape
    table: Tables = tables(mask, grid, TILE_Q, TILE_K, q.device)
    plan, visits = table.plan, table.by_query
    parts = torch.empty(B * R * N, splits, D, dtype=torch.float32, device=q.device)
    statistics = torch.empty(B * R * N, splits, 2, dtype=torch.float32, device=q.device)
    out = torch.empty(B, R, N, D, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    L = text_valid.shape[1]
    decode_partial[(B * R * N * splits,)](
        q, k, v, text_valid.view(torch.uint8), tokens, _slot_of(mask, grid, q.device), parts, statistics, table.words,
        visits["start"], visits["end"], visits["visited"], table.key_rows, table.key_count, table.key_words,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *tokens.stride(),
        scale * math.log2(math.e), L, -(-L // TILE_K), plan.query.rows.size, R, N, N // k.shape[2],
        plan.box.constant if plan.box else 0, plan.box.guards if plan.box else 0,
        HEAD_DIM=D, TILE_Q=TILE_Q, TILE_K=TILE_K, SPLITS=splits, BOX=plan.box is not None, SIMPLE=plan.simple,
        num_warps=4,
    )  # fmt: skip
    decode_join[(B * R * N,)](parts, statistics, out, HEAD_DIM=D, SPLITS=splits, num_warps=1)
    return out
