"""Cross entropy over a vocabulary that is cut over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megacog.parallel.tensor import TensorParallel


def parallel_cross_entropy(logits_XV: Tensor, targets_X: Tensor, first: int, parallel: TensorParallel) -> Tensor:
    """Cross entropy per row in fp32: [X].

    Args:
        logits_XV: This rank's columns of the logits; may be empty ([X, 0]).
        targets_X: int64 targets in the whole vocabulary.
        first: Vocabulary id of this rank's first column.
        parallel: The ranks that hold the other columns.
    """
    if parallel.size == 1:
        return F.cross_entropy(logits_XV.float(), targets_X, reduction="none")
    return _ParallelCrossEntropy.apply(logits_XV.float(), targets_X, first, parallel.group)


class _ParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_XV: Tensor, targets_X: Tensor, first: int, group: Any) -> Tensor:
        X, V = logits_XV.shape
        peak_X = logits_XV.amax(dim=1) if V else logits_XV.new_full((X,), -torch.inf)
        dist.all_reduce(peak_X, op=dist.ReduceOp.MAX, group=group)
        shifted_XV = logits_XV - peak_X[:, None]
        exp_XV = shifted_XV.exp()
        local_X = targets_X - first
        mine_X = (local_X >= 0) & (local_X < V)
        column_X = local_X.masked_fill(~mine_X, 0)
        target_X = shifted_XV.gather(1, column_X[:, None])[:, 0] * mine_X if V else peak_X.new_zeros(X)
        sums_2X = torch.stack([exp_XV.sum(dim=1), target_X])
        dist.all_reduce(sums_2X, group=group)
        ctx.save_for_backward(exp_XV / sums_2X[0][:, None], column_X, mine_X)
        return sums_2X[0].log() - sums_2X[1]

    @staticmethod
    def backward(ctx: Any, grad_X: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        probability_XV, column_X, mine_X = ctx.saved_tensors
        grad_XV = probability_XV.clone()
        if grad_XV.shape[1]:
            grad_XV.scatter_add_(1, column_X[:, None], -mine_X[:, None].to(grad_XV.dtype))
        return grad_XV * grad_X[:, None], None, None, None
