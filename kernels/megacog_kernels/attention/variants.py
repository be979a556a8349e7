"""Every attention kernel that dispatch can pick, on tensors without storage: to compile them ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megacog_kernels.attention.calls import (
    Inputs,
    backward_key_call,
    backward_query_call,
    forward_call,
    text_rows,
)
from megacog_kernels.attention.configurations import configurations, is_dense
from megacog_kernels.attention.decode import join_call, partial_call
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid
from megacog_kernels.launch import Call

GRID, TEXT = VideoGrid(3, 20, 20), 64
MIXED = Order((0, 0, 0), (True, False, True))
"""An order that `point` and `last` do not decide."""
MASKS = {
    "full": MaskSpec(Order.sequential(3), Space()),
    "full, rows": MaskSpec(Order.interpolation(3), Space()),
    "frame": MaskSpec(Order.sequential(3), Space("frame")),
    "window": MaskSpec(Order.interpolation(3), Space("shifted_window", (10, 10))),
    "local": MaskSpec(Order.sequential(3), Space("local3d", (9, 9))),
    "window, mixed": MaskSpec(MIXED, Space("shifted_window", (10, 10))),
    "local, mixed": MaskSpec(MIXED, Space("local3d", (9, 9))),
}
"""One mask for each kind of code; several give the same kernel."""


def variants(dtype: torch.dtype, capability: int) -> Iterator[tuple[str, Call]]:
    """Names and launches of all kernels for one dtype and major compute capability."""
    for head_dim in (64, 128):
        for name, mask in MASKS.items():
            for kernel, call in _training(mask, GRID, dtype, head_dim, capability):
                yield f"{kernel}, {name}, d{head_dim}", call
        for kernel, call in _training(*text_rows(TEXT), dtype, head_dim, capability, frames=False):
            yield f"{kernel}, text rows, d{head_dim}", call
        for name, mask in MASKS.items():
            yield f"decode, {name}, d{head_dim}", _decode(mask, dtype, head_dim)[0]
        yield f"decode join, d{head_dim}", _decode(mask, dtype, head_dim)[1]


def _fused(rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v as strided views of one buffer, as a fused projection makes them: [1, rows, heads, head_dim]."""
    qkv = torch.empty(1, rows, 3 * heads * head_dim, dtype=dtype, device="meta")
    return tuple(part.unflatten(-1, (heads, head_dim)) for part in qkv.chunk(3, dim=-1))


def _training(
    mask: MaskSpec, grid: VideoGrid, dtype: torch.dtype, head_dim: int, capability: int, frames: bool = True
) -> Iterator[tuple[str, Call]]:
    """Every launch of a forward and a backward pass."""
    (q, k, v), (_, text_k, text_v) = (_fused(rows, 2, head_dim, dtype) for rows in (grid.tokens, TEXT))
    valid = torch.empty(1, TEXT, dtype=torch.bool, device="meta")
    frame_k, frame_v = (k, v) if frames else (None, None)
    given = Inputs(q, frame_k, frame_v, text_k, text_v, valid, mask, grid, head_dim**-0.5)
    out, text_out = torch.empty(q.shape, dtype=dtype, device="meta"), torch.empty_like(text_k)
    statistics, sums = torch.empty(1, 2, grid.tokens, device="meta"), torch.empty(q.shape, device="meta")
    chosen = configurations(head_dim, dtype, frames and is_dense(mask), capability)
    yield "forward", forward_call(given, out, statistics, chosen.forward)
    yield "grad q", backward_query_call(given, out, out, statistics, statistics, out, chosen.query)
    yield "delta", backward_query_call(given, out, out, statistics, statistics, None, chosen.query)
    for added, name in ((None, "k, v"), (sums, "k, v and q")):
        arguments = (given, out, statistics, statistics)
        yield f"grad text {name}", backward_key_call(*arguments, text_out, text_out, chosen.key, True, added)
        if frames:
            yield f"grad {name}", backward_key_call(*arguments, out, out, chosen.key, False, added)


def _decode(mask: MaskSpec, dtype: torch.dtype, head_dim: int) -> tuple[Call, Call]:
    q, k, v = _fused(TEXT + GRID.tokens, 2, head_dim, dtype)
    valid = torch.empty(1, TEXT, dtype=torch.bool, device="meta")
    tokens = torch.empty(1, 1, dtype=torch.int32, device="meta")
    parts, statistics = (torch.empty(2, 8, width, device="meta") for width in (head_dim, 2))
    partial = partial_call(q[:, :1], k, v, valid, tokens, mask, GRID, 1.0, 0.0, parts, statistics)
    return partial, join_call(parts, statistics, torch.empty(1, 1, 2, head_dim, dtype=dtype, device="meta"))
