"""What is done to the rows of a chunk of logits, in Triton: one program per row, which reads it once.

Rows stand `logits_row` elements apart, a multiple of 16 and at least `columns`. What lies between the
columns and the next row is read and overwritten, too: masks that end there keep loads and stores wide whatever
the number of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def summarize_rows(logits, targets, lse, target, logits_row, columns, TILE: tl.constexpr):
    """Logsumexp of a row (-inf without columns), and its target's logit (0 without such a column).

    logits [X, logits_row]; targets int64 [X]; lse, target fp32 [X].
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * logits_row
    maximum = tl.full([], -3.4028234663852886e38, tl.float32)  # the lowest: -inf - -inf would be NaN
    total = tl.full([], 0.0, tl.float32)
    for first in range(0, columns, TILE):
        at = first + tl.arange(0, TILE)
        value = tl.load(logits + at, mask=at < logits_row, other=0.0).to(tl.float32)
        value = tl.where(at < columns, value, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(value, 0))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(value - new_maximum), 0)
        maximum = new_maximum
    tl.store(lse + row, maximum + tl.log(total))
    column = tl.load(targets + row)
    inside = (column >= 0) & (column < columns)
    tl.store(target + row, tl.load(logits + column, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def differentiate_rows(logits, targets, lse, grad_lse, grad_target, logits_row, columns, TILE: tl.constexpr):
    """Overwrites a row of logits by its gradient: grad_lse * exp(logit - lse), plus grad_target at the target.

    logits [X, logits_row]; targets int64 [X]; lse, grad_lse, grad_target fp32 [X].
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * logits_row
    column = tl.load(targets + row)
    row_lse, row_grad, target_grad = tl.load(lse + row), tl.load(grad_lse + row), tl.load(grad_target + row)
    for first in range(0, columns, TILE):
        at = first + tl.arange(0, TILE)
        value = tl.load(logits + at, mask=at < logits_row, other=0.0).to(tl.float32)
        value = tl.where(at < columns, value, float("-inf"))
        grad = row_grad * tl.exp(value - row_lse) + tl.where(at == column, target_grad, 0.0)
        tl.store(logits + at, grad.to(logits.dtype.element_ty), mask=at < logits_row)
