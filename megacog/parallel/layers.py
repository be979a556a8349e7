"""Linear and embedding layers whose weights are cut over tensor-parallel ranks.

With one rank they are the ordinary layers. The linear ones may hold a frozen weight in e4m3, when they have a
`weight_scale` (`megacog.parallel.fp8`). Shapes: C width, V vocabulary, `...` any leading dims.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megacog.parallel.fp8 import input_gradient, product
from megacog.parallel.loss import parallel_cross_entropy
from megacog.parallel.tensor import ShardSpec, TensorParallel, copy_to_ranks, mark_sharded, sum_over_ranks
from megacog_kernels.dispatch import Implementation
from megacog_kernels.keep import kept


class ColumnParallelLinear(nn.Module):
    """x @ weight^T + bias with the output features cut over ranks (`blocks` = 3 for q|k|v)."""

    def __init__(self, features_in: int, features_out: int, parallel: TensorParallel, blocks: int = 1) -> None:
        super().__init__()
        if features_out % (blocks * parallel.size):
            raise ValueError(f"{parallel.size} tensor-parallel ranks do not divide {features_out // blocks} features")
        self.parallel = parallel
        shard = ShardSpec(dim=0, length=features_out, blocks=blocks)
        self.weight = nn.Parameter(torch.empty(shard.local_length(parallel.size), features_in))
        self.bias = nn.Parameter(torch.empty(shard.local_length(parallel.size)))
        mark_sharded(self.weight, shard, parallel.size)
        mark_sharded(self.bias, shard, parallel.size)
        self.weight_scale: Tensor | None
        self.register_buffer("weight_scale", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., features_out / ranks]."""
        return product(copy_to_ranks(x, self.parallel), self.weight, self.weight_scale, self.bias)


class _SummedProduct(torch.autograd.Function):
    """x @ weight^T, summed over the ranks, + bias; kept where layers are recomputed: much work for little memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor, parallel: TensorParallel
    ) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight, weight_scale)
        (out,) = kept(lambda: (_summed_product(x, weight, weight_scale, bias, parallel),))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, weight_scale = ctx.saved_tensors
        of_x, of_weight, _, of_bias = ctx.needs_input_grad[:4]
        rows = grad.flatten(0, -2)
        return (
            input_gradient(grad, weight, weight_scale) if of_x else None,
            rows.T @ x.flatten(0, -2) if of_weight else None,
            None,
            rows.sum(dim=0) if of_bias else None,
            None,
        )


def _summed_product(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor, parallel: TensorParallel
) -> Tensor:
    if parallel.size == 1:
        return product(x, weight, weight_scale, bias)
    out = product(x, weight, weight_scale)
    dist.all_reduce(out, group=parallel.group)
    return out.add_(bias)


class RowParallelLinear(nn.Module):
    """x @ weight^T + bias with the input features cut over ranks; the output is whole."""

    def __init__(self, features_in: int, features_out: int, parallel: TensorParallel) -> None:
        super().__init__()
        if features_in % parallel.size:
            raise ValueError(f"{parallel.size} tensor-parallel ranks do not divide {features_in} features")
        self.parallel = parallel
        self.weight = nn.Parameter(torch.empty(features_out, features_in // parallel.size))
        self.bias = nn.Parameter(torch.empty(features_out))
        mark_sharded(self.weight, ShardSpec(dim=1, length=features_in), parallel.size)
        self.weight_scale: Tensor | None
        self.register_buffer("weight_scale", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., features_in / ranks] -> [..., features_out]."""
        out: Tensor = _SummedProduct.apply(x, self.weight, self.weight_scale, self.bias, self.parallel)
        return out


class VocabParallelEmbedding(nn.Module):
    """An embedding table cut over ranks, and the output head tied to it.

    Rows are padded so that every rank holds as many. All uses go through `forward`, so that
    parameter hooks (ZeRO 3) see them.
    """

    def __init__(self, vocabulary: int, width: int, parallel: TensorParallel, kernels: Implementation = "auto") -> None:
        super().__init__()
        self.parallel = parallel
        self.vocabulary = vocabulary
        self.kernels: Implementation = kernels
        """What runs the cross entropy."""
        shard = ShardSpec(dim=0, length=vocabulary)
        rows = shard.local_length(parallel.size)
        self.first = rows * parallel.rank
        """First vocabulary row of this rank."""
        self.rows = max(0, min(rows, vocabulary - self.first))
        """Rows of this rank that are no padding."""
        self.weight = nn.Parameter(torch.empty(rows, width))
        mark_sharded(self.weight, shard, parallel.size)

    def forward(self, x: Tensor, *, as_head: bool = False, targets: Tensor | None = None) -> Tensor:
        """Embeddings [..., C] of ids [...].

        Or, of hidden states [..., C]: local logits [..., rows] (`as_head`), or the fp32 cross entropy [...] of
        `targets` (int64 ids [...]) over the whole vocabulary.
        """
        if targets is not None:
            hidden_XC, weight, targets_X = x.flatten(0, -2), self.weight[: self.rows], targets.flatten()
            loss_X = parallel_cross_entropy(hidden_XC, weight, targets_X, self.first, self.parallel, self.kernels)
            return loss_X.view_as(targets)
        if as_head:
            return F.linear(copy_to_ranks(x, self.parallel), self.weight[: self.rows])
        if self.parallel.size == 1:
            return F.embedding(x, self.weight)
        local = x - self.first
        mine = (local >= 0) & (local < self.rows)
        rows = F.embedding(local.masked_fill(~mine, 0), self.weight) * mine.unsqueeze(-1)
        return sum_over_ranks(rows, self.parallel)
