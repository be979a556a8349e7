"""Kernels of the mix: a program takes BLOCK channels of `row_steps` times TILE rows.

Tensors are contiguous: rows [rows, WIDTH], logit [WIDTH].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(column_blocks, row_steps, rows, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """This program's channels, and its rows: the chunk's number, the first one and the end."""
    chunk = tl.program_id(0) // column_blocks
    channel = tl.program_id(0) % column_blocks * BLOCK + tl.arange(0, BLOCK)
    first = chunk * row_steps * TILE
    return channel, channel < WIDTH, chunk, first, tl.minimum(first + row_steps * TILE, rows)


@triton.jit
def _share(logit, channel, inside):
    """sigmoid(logit), fp32 [1, BLOCK]."""
    return tl.sigmoid(tl.load(logit + channel, mask=inside, other=0.0).to(tl.float32))[None, :]


@triton.jit
def mix_forward(
    base, plus, logit, out, column_blocks, row_steps, rows,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Fills out."""
    channel, inside, _, first, end = _place(column_blocks, row_steps, rows, TILE, BLOCK, WIDTH)
    share = _share(logit, channel, inside)
    for start in range(first, end, TILE):
        row = start + tl.arange(0, TILE)
        real = (row < end)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * WIDTH + channel[None, :]
        value = share * tl.load(base + at, mask=real, other=0.0).to(tl.float32)
        value += (1.0 - share) * tl.load(plus + at, mask=real, other=0.0).to(tl.float32)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=real)


@triton.jit
def mix_backward(
    grad_out, base, plus, logit, grad_base, grad_plus, partial, column_blocks, row_steps, rows,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    BASE: tl.constexpr, PLUS: tl.constexpr, LOGIT: tl.constexpr,
):
    """Fills the gradients that are wanted: of base, of plus, and partial fp32 [chunks, WIDTH].

    partial is this program's share of the gradient of a; that of the logit is a * (1 - a) times it.
    """
    channel, inside, chunk, first, end = _place(column_blocks, row_steps, rows, TILE, BLOCK, WIDTH)
    share = _share(logit, channel, inside)
    total = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(first, end, TILE):
        row = start + tl.arange(0, TILE)
        real = (row < end)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * WIDTH + channel[None, :]
        grad = tl.load(grad_out + at, mask=real, other=0.0).to(tl.float32)
        if BASE:
            tl.store(grad_base + at, (share * grad).to(grad_base.dtype.element_ty), mask=real)
        if PLUS:
            tl.store(grad_plus + at, ((1.0 - share) * grad).to(grad_plus.dtype.element_ty), mask=real)
        if LOGIT:
            difference = tl.load(base + at, mask=real, other=0.0).to(tl.float32)
            difference -= tl.load(plus + at, mask=real, other=0.0).to(tl.float32)
            total += grad * difference
    if LOGIT:
        tl.store(partial + chunk.to(tl.int64) * WIDTH + channel, tl.sum(total, 0), mask=inside)
