"""Arguments of the row kernels: to run them, or to compile them ahead of time.

The kernels, and Triton with them, are imported by the calls that use them.

Legend: X rows of a chunk of logits, V columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megacog_kernels.cross_entropy.chunks import ALIGNMENT, chunk_rows, row_stride
from megacog_kernels.launch import Call, Warps

TILE = 4096
"""Elements that a program has in flight: 16 per thread, two or four 16-byte loads."""
WARPS = Warps(num_warps=8, resident=4)


def summarize_call(logits_XV: Tensor, targets_X: Tensor, lse_X: Tensor, target_X: Tensor, tile: int = TILE) -> Call:
    """Fills lse and target, fp32 [X]."""
    from megacog_kernels.cross_entropy.kernels import summarize_rows

    return _call(summarize_rows, logits_XV, {"targets": targets_X, "lse": lse_X, "target": target_X}, tile)


def differentiate_call(
    logits_XV: Tensor,
    targets_X: Tensor,
    lse_X: Tensor,
    grad_lse_X: Tensor,
    grad_target_X: Tensor,
    tile: int = TILE,
) -> Call:
    """Overwrites the logits by their gradient."""
    from megacog_kernels.cross_entropy.kernels import differentiate_rows

    vectors = {"targets": targets_X, "lse": lse_X, "grad_lse": grad_lse_X, "grad_target": grad_target_X}
    return _call(differentiate_rows, logits_XV, vectors, tile)


def _call(kernel: Any, logits_XV: Tensor, vectors: dict[str, Tensor], tile: int) -> Call:
    (X, V), stride = logits_XV.shape, logits_XV.stride(0)
    assert stride % ALIGNMENT == 0 and stride >= V, "the kernels write up to the stride"
    arguments = {"logits": logits_XV, **vectors, "logits_row": stride, "columns": V}
    return Call(kernel, arguments, {"TILE": tile}, X, WARPS)


def variants(dtype: torch.dtype, columns: int = 20000) -> Iterator[tuple[str, Call]]:
    """Every kernel with the tensors of a typical call, without storage: to compile it ahead of time."""
    logits_XV = torch.empty(chunk_rows(columns, dtype), row_stride(columns), dtype=dtype, device="meta")[:, :columns]
    targets_X = torch.empty(len(logits_XV), dtype=torch.int64, device="meta")
    vector_X = torch.empty(len(logits_XV), device="meta")
    yield "logsumexp, target", summarize_call(logits_XV, targets_X, vector_X, vector_X)
    yield "grad logits", differentiate_call(logits_XV, targets_X, vector_X, vector_X, vector_X)
