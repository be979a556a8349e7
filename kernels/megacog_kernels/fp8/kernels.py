"""Kernels of quantization: a program takes a whole row, or a tile that it turns over."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_row(x, columns, codes, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr):
    """Fills one row of codes [rows, WIDTH], float8_e4m3fn, and its entry of scales [rows], fp32.

    The row of x [rows, WIDTH] stays in registers. With SCALED it is multiplied by columns [WIDTH] fp32 first.
    """
    row = tl.program_id(0)
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    at = row.to(tl.int64) * WIDTH + channel
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(columns + channel, mask=inside, other=0.0)
    amax = tl.max(tl.abs(value), 0)
    # The least power of two by which the row fits below 448 = 1.75 * 2^8: exponents only, mantissas stay.
    bits = amax.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.maximum(exponent, 1)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    # The conversion saturates and the maximum passes over NaNs: what is not finite must show in the scale.
    finite = tl.min((tl.abs(value) < float("inf")).to(tl.int32), 0) == 1
    scale = tl.where(finite, scale, float("nan"))
    tl.store(codes + at, (value * inverse).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def transpose(source, target, rows, columns, column_tiles, TILE: tl.constexpr):
    """Fills target [columns, rows] from source [rows, columns], bytes."""
    row = tl.program_id(0) // column_tiles * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) % column_tiles * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(source + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0)
    at = column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(target + at, tl.trans(tile), mask=tl.trans(inside))
