"""The linear head over chunks of rows: one buffer holds one chunk's logits, nothing holds all of them.

The matrix products are torch's; what happens to a chunk's rows is handed in.

Legend: X rows, C width, V columns (rows of the weight).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megacog_kernels.products import product

ALIGNMENT = 64
"""Of the elements from one row of a buffer to the next: for wide loads, and for matrix products."""
CHUNK_BYTES = 64 * 2**20
"""Memory of the logits that exist at once: many tiles of a matrix product, and not far above an L2 cache."""
_TILE = 128
"""Rows that a matrix product computes together."""


@dataclass(frozen=True)
class RowFunctions:
    """What is done to a chunk's rows; documented in reference.py."""

    summarize: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    differentiate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def chunk_rows(columns: int, dtype: torch.dtype, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows whose logits fit in `chunk_bytes`, at least one."""
    rows = max(1, chunk_bytes // (row_stride(columns) * dtype.itemsize))
    return rows // _TILE * _TILE or rows


def row_stride(columns: int) -> int:
    """Elements from one row of logits to the next."""
    return -(-max(1, columns) // ALIGNMENT) * ALIGNMENT


def _chunks(hidden_XC: Tensor, weight_VC: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a chunk and their logits, which the next chunk overwrites."""
    X, V = hidden_XC.shape[0], weight_VC.shape[0]
    buffer = hidden_XC.new_empty(min(rows, X), row_stride(V))
    buffer[:, V:] = 0.0  # which oneDNN reads beside bf16 rows on CPUs that multiply them: 0 times NaN would be NaN
    for first in range(0, X, rows):
        chunk = slice(first, min(first + rows, X))
        logits = buffer[: chunk.stop - first, :V]
        product(hidden_XC[chunk], weight_VC.T, out=logits)
        yield chunk, logits


def forward(
    hidden_XC: Tensor, weight_VC: Tensor, targets_X: Tensor, rows: int, functions: RowFunctions
) -> tuple[Tensor, Tensor]:
    """Logsumexp and target's logit of every row: fp32 [X] each."""
    lse_X = torch.empty(targets_X.shape, dtype=torch.float32, device=hidden_XC.device)
    target_X = torch.empty_like(lse_X)
    for chunk, logits in _chunks(hidden_XC, weight_VC, rows):
        functions.summarize(logits, targets_X[chunk], lse_X[chunk], target_X[chunk])
    return lse_X, target_X


def backward(
    grad_lse_X: Tensor,
    grad_target_X: Tensor,
    lse_X: Tensor,
    hidden_XC: Tensor,
    weight_VC: Tensor,
    targets_X: Tensor,
    rows: int,
    functions: RowFunctions,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden states and weight in their dtypes, None where not `needed`.

    Logits are computed again. The weight's gradient is a sum over all chunks, kept in fp32 until its end.
    """
    grad_XC = torch.empty_like(hidden_XC, memory_format=torch.contiguous_format) if needed[0] else None
    sum_VC = torch.zeros(weight_VC.shape, dtype=torch.float32, device=weight_VC.device) if needed[1] else None
    for chunk, logits in _chunks(hidden_XC, weight_VC, rows):
        functions.differentiate(logits, targets_X[chunk], lse_X[chunk], grad_lse_X[chunk], grad_target_X[chunk])
        if grad_XC is not None:
            product(logits, weight_VC, out=grad_XC[chunk])
        if sum_VC is not None:
            _add_product(sum_VC, logits.T, hidden_XC[chunk])
    return grad_XC, None if sum_VC is None else sum_VC.to(weight_VC.dtype)


def _add_product(sum_VC: Tensor, left_VX: Tensor, right_XC: Tensor) -> None:
    """sum += left @ right, in fp32."""
    if left_VX.dtype == sum_VC.dtype or not sum_VC.is_cuda:
        sum_VC.addmm_(left_VX.to(sum_VC.dtype), right_XC.to(sum_VC.dtype))
    else:  # half precision in, fp32 out: without copies of the factors, but only cuBLAS can
        torch.addmm(sum_VC, left_VX, right_XC, out_dtype=sum_VC.dtype, out=sum_VC)
