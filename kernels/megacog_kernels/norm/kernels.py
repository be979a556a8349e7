"""Kernels of the norms. A program holds whole rows in registers, so that every element is read once.

out = x + LN_a(y) if RESIDUAL, else out is y itself; normed = LN_b(out) if NORMED.

Tensors are contiguous: rows [rows, WIDTH]; `statistics` fp32 [rows, 2 * norms], mean and 1 / deviation
of norm a, then of norm b, of those that there are. A program takes `rows_per_program` rows, a multiple
of TILE, TILE at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(pointer, at, inside):
    """Elements in fp32, 0 outside."""
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _statistics(value, inside, eps, WIDTH: tl.constexpr):
    """Mean of every row and 1 / deviation, in two passes over registers: no cancellation."""
    mean = tl.sum(value, 1) / WIDTH
    centered = tl.where(inside, value - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / WIDTH + eps)


@triton.jit
def norm_forward(
    x, y, weight_a, bias_a, weight_b, bias_b, out, normed, statistics, rows_per_program, rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RESIDUAL: tl.constexpr, NORMED: tl.constexpr,
):
    """Fills out if RESIDUAL, normed if NORMED, and the statistics."""
    channel = tl.arange(0, BLOCK)[None, :]
    known = channel < WIDTH
    first = tl.program_id(0) * rows_per_program
    for start in range(first, tl.minimum(first + rows_per_program, rows), TILE):
        row = start + tl.arange(0, TILE)
        real = row < rows
        inside = real[:, None] & known
        at = row.to(tl.int64)[:, None] * WIDTH + channel
        of_row = statistics + row * 2 * (RESIDUAL + NORMED)
        value = _load(y, at, inside)
        if RESIDUAL:
            mean, rstd = _statistics(value, inside, eps, WIDTH)
            tl.store(of_row, mean, mask=real)
            tl.store(of_row + 1, rstd, mask=real)
            hat = (value - mean[:, None]) * rstd[:, None]
            value = hat * _load(weight_a, channel, known) + _load(bias_a, channel, known)
            # What norm b sees is what is stored: the backward pass reads it again.
            rounded = (_load(x, at, inside) + value).to(out.dtype.element_ty)
            tl.store(out + at, rounded, mask=inside)
            value = rounded.to(tl.float32)
        if NORMED:
            mean, rstd = _statistics(value, inside, eps, WIDTH)
            tl.store(of_row + 2 * RESIDUAL, mean, mask=real)
            tl.store(of_row + 2 * RESIDUAL + 1, rstd, mask=real)
            hat = (value - mean[:, None]) * rstd[:, None]
            value = hat * _load(weight_b, channel, known) + _load(bias_b, channel, known)
            tl.store(normed + at, value.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _normed(pointer, at, inside, of_row, real):
    """Rows as they were normed, before weight and bias, and their 1 / deviation."""
    mean = tl.load(of_row, mask=real, other=0.0)
    rstd = tl.load(of_row + 1, mask=real, other=0.0)
    return (_load(pointer, at, inside) - mean[:, None]) * rstd[:, None], rstd


@triton.jit
def _grad_input(grad, hat, weight, rstd, WIDTH: tl.constexpr):
    """Gradient of a norm's input, from that of its output; weight is 0 beyond the width."""
    weighted = grad * weight
    mean, slope = tl.sum(weighted, 1) / WIDTH, tl.sum(weighted * hat, 1) / WIDTH
    return (weighted - mean[:, None] - hat * slope[:, None]) * rstd[:, None]


@triton.jit
def norm_backward(
    grad_out, grad_normed, out, y, weight_a, weight_b, statistics, grad_x, grad_y, partial, rows_per_program, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RESIDUAL: tl.constexpr, NORMED: tl.constexpr,
    GRAD_X: tl.constexpr, GRAD_Y: tl.constexpr, GRAD_A: tl.constexpr, GRAD_B: tl.constexpr,
):
    """Fills the gradients that are wanted: of x, y, and of the weight and bias of norms a and b.

    partial: fp32 [programs, 2 * (GRAD_A + GRAD_B), WIDTH], this program's share of the gradients of
    weight and bias of a, then of b.
    """
    channel = tl.arange(0, BLOCK)[None, :]
    known = channel < WIDTH
    program = tl.program_id(0)
    first = program * rows_per_program
    weight_a_sum = tl.zeros([TILE, BLOCK], tl.float32)
    bias_a_sum = tl.zeros([TILE, BLOCK], tl.float32)
    weight_b_sum = tl.zeros([TILE, BLOCK], tl.float32)
    bias_b_sum = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + rows_per_program, rows), TILE):
        row = start + tl.arange(0, TILE)
        real = row < rows
        inside = real[:, None] & known
        at = row.to(tl.int64)[:, None] * WIDTH + channel
        of_row = statistics + row * 2 * (RESIDUAL + NORMED)
        grad = tl.zeros([TILE, BLOCK], tl.float32)
        if RESIDUAL:
            grad = _load(grad_out, at, inside)
        if NORMED:
            hat, rstd = _normed(out, at, inside, of_row + 2 * RESIDUAL, real)
            grad_b = _load(grad_normed, at, inside)
            if GRAD_B:
                weight_b_sum += grad_b * hat
                bias_b_sum += grad_b
            grad += _grad_input(grad_b, hat, _load(weight_b, channel, known), rstd, WIDTH)
        if GRAD_X:
            tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
        if RESIDUAL:
            hat, rstd = _normed(y, at, inside, of_row, real)
            if GRAD_A:
                weight_a_sum += grad * hat
                bias_a_sum += grad
            if GRAD_Y:
                grad = _grad_input(grad, hat, _load(weight_a, channel, known), rstd, WIDTH)
        if GRAD_Y:
            tl.store(grad_y + at, grad.to(grad_y.dtype.element_ty), mask=inside)

    channel = tl.arange(0, BLOCK)
    known = channel < WIDTH
    partial += program.to(tl.int64) * (2 * (GRAD_A + GRAD_B)) * WIDTH + channel
    if GRAD_A:
        tl.store(partial, tl.sum(weight_a_sum, 0), mask=known)
        tl.store(partial + WIDTH, tl.sum(bias_a_sum, 0), mask=known)
        partial += 2 * WIDTH
    if GRAD_B:
        tl.store(partial, tl.sum(weight_b_sum, 0), mask=known)
        tl.store(partial + WIDTH, tl.sum(bias_b_sum, 0), mask=known)
