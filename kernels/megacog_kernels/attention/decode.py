"""Decoding: a few new tokens against static buffers of keys and values.

Positions are read on the device and shapes never change, so that one captured CUDA graph serves
every step. Shares of a token's keys are joined in the same order in every run.

Legend: B batch, L text length, F frame tokens, S = L + F slots of a buffer, R new tokens per sample,
N heads, M key heads, D head dim.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from megacog_kernels.attention.calls import strided
from megacog_kernels.attention.plan import tile_plan
from megacog_kernels.attention.tables import Tables, tables
from megacog_kernels.grid import MaskSpec, VideoGrid
from megacog_kernels.launch import Call, Warps

TILE_Q, TILE_K = 16, 64


@cache
def _slot_of(mask: MaskSpec, grid: VideoGrid, device: torch.device) -> Tensor:
    """Slot of every frame token among the queries of the plan: int32 [F]."""
    query = tile_plan(mask, grid, TILE_Q, TILE_K).query
    slots = np.empty(grid.tokens, dtype=np.int32)
    slots[query.rows[query.real]] = np.flatnonzero(query.real)
    return torch.from_numpy(slots).to(device)


def decode(
    q: Tensor, k: Tensor, v: Tensor, text_valid: Tensor, tokens: Tensor, mask: MaskSpec, grid: VideoGrid,
    scale: float, text_bias: float, splits: int,
) -> Tensor:  # fmt: skip
    """See `decode_attention` of ops.py, which checks the arguments."""
    B, R, N, D = q.shape
    parts = torch.empty(B * R * N, splits, D, dtype=torch.float32, device=q.device)
    statistics = torch.empty(B * R * N, splits, 2, dtype=torch.float32, device=q.device)
    out = torch.empty(B, R, N, D, dtype=q.dtype, device=q.device)
    partial_call(q, k, v, text_valid, tokens, mask, grid, scale, text_bias, parts, statistics).run()
    join_call(parts, statistics, out).run()
    return out


def partial_call(
    q: Tensor, k: Tensor, v: Tensor, text_valid: Tensor, tokens: Tensor, mask: MaskSpec, grid: VideoGrid,
    scale: float, text_bias: float, parts: Tensor, statistics: Tensor,
) -> Call:  # fmt: skip
    """Fills parts fp32 [B * R * N, splits, D] and statistics fp32 [B * R * N, splits, 2]."""
    from megacog_kernels.attention.decode_kernels import decode_partial

    (_, R, N, D), splits = q.shape, parts.shape[1]
    table: Tables = tables(mask, grid, TILE_Q, TILE_K, q.device)
    plan, visits, L = table.plan, table.by_query, text_valid.shape[1]
    box = plan.box
    arguments = strided(q=q, k=k, v=v) | {"text_valid": text_valid.view(torch.uint8), "tokens": tokens}
    arguments |= {"tokens_batch": tokens.stride(0), "tokens_row": tokens.stride(1)}
    arguments |= {"slot_of": _slot_of(mask, grid, q.device), "parts": parts, "statistics": statistics}
    arguments |= {"words": table.words, "key_words": table.key_words}
    arguments |= {"key_rows": table.key_rows, "key_count": table.key_count}
    arguments |= {name: visits[name] for name in ("start", "end", "visited")}
    arguments |= {"scale": scale * math.log2(math.e), "text_bias": text_bias * math.log2(math.e)}
    arguments |= {"text_length": L, "text_tiles": -(-L // TILE_K)}
    arguments |= {"total_slots": plan.query.rows.size, "new_rows": R, "heads": N, "group": N // k.shape[2]}
    arguments |= {"box_constant": box.constant if box else 0, "box_guards": box.guards if box else 0}
    constants = {"HEAD_DIM": D, "TILE_Q": TILE_Q, "TILE_K": TILE_K, "SPLITS": splits}
    constants |= {"BOX": box is not None, "SIMPLE": plan.simple}
    return Call(decode_partial, arguments, constants, parts.shape[0] * splits, Warps(4, resident=4))


def join_call(parts: Tensor, statistics: Tensor, out: Tensor) -> Call:
    """Fills out [B, R, N, D], contiguous."""
    from megacog_kernels.attention.decode_kernels import decode_join

    items, splits, head_dim = parts.shape
    arguments = {"parts": parts, "statistics": statistics, "out": out}
    return Call(decode_join, arguments, {"HEAD_DIM": head_dim, "SPLITS": splits}, items, Warps(1, resident=16))
