"""Linear and embedding layers whose weights are cut over tensor-parallel ranks.

With one rank they are the ordinary layers. The linear ones may hold a frozen weight in e4m3, when they have a
`weight_scale` (`megacog.parallel.fp8`). Shapes: C width, V vocabulary, `...` any leading dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megacog.parallel.fp8 import input_gradient, weight_product
from megacog.parallel.loss import parallel_cross_entropy
from megacog.parallel.tensor import ShardSpec, TensorParallel, copy_to_ranks, mark_sharded, sum_over_ranks
from megacog_kernels.dispatch import Implementation
from megacog_kernels.keep import kept
from megacog_kernels.products import add_product, multiply, product


class _BlockProducts(torch.autograd.Function):
    """Each input @ a span of one weight's rows, + bias. The weight's gradient is one tensor, which all add to."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, weight_scale: Tensor | None, bias: Tensor, spans: Sequence[slice], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.spans = spans
        ctx.save_for_backward(weight, weight_scale, *(x if ctx.needs_input_grad[0] else None for x in inputs))
        return tuple(
            weight_product(x, weight[span], _part(weight_scale, span), bias[span])
            for x, span in zip(inputs, spans, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, weight_scale, *inputs = ctx.saved_tensors
        of_weight, _, of_bias, _, *of_inputs = ctx.needs_input_grad
        grad_inputs = [
            input_gradient(grad, weight[span], _part(weight_scale, span)) if wanted else None
            for grad, span, wanted in zip(grads, ctx.spans, of_inputs, strict=True)
        ]
        grad_weight, grad_bias = None, None
        if of_weight:
            grad_weight = _sum_products(weight, ctx.spans, grads, inputs)
        if of_bias:
            grad_bias = weight.new_zeros(len(weight))
            for grad, span in zip(grads, ctx.spans, strict=True):
                grad_bias[span] += grad.flatten(0, -2).sum(dim=0)
        return grad_weight, None, grad_bias, None, *grad_inputs


def _part(weight_scale: Tensor | None, span: slice) -> Tensor | None:
    return None if weight_scale is None else weight_scale[span]


def _sum_products(
    weight: Tensor, spans: Sequence[slice], grads: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Tensor:
    """Sum of grad^T @ input over each span of rows, like the weight; rows are written in ascending order first."""
    total, written = torch.empty_like(weight), 0
    for span, grad, x in zip(spans, grads, inputs, strict=True):
        columns, rows = grad.flatten(0, -2).T, x.flatten(0, -2)
        if span.start < written:
            add_product(columns, rows, total[span])
            continue
        total[written : span.start] = 0
        product(columns, rows, out=total[span])
        written = span.stop
    total[written:] = 0
    return total


class ColumnParallelLinear(nn.Module):
    """x @ weight^T + bias with the output features cut over ranks (`blocks` = 3 for q|k|v)."""

    def __init__(self, features_in: int, features_out: int, parallel: TensorParallel, blocks: int = 1) -> None:
        super().__init__()
        if features_out % (blocks * parallel.size):
            raise ValueError(f"{parallel.size} tensor-parallel ranks do not divide {features_out // blocks} features")
        self.parallel = parallel
        self.blocks = blocks
        shard = ShardSpec(dim=0, length=features_out, blocks=blocks)
        self.weight = nn.Parameter(torch.empty(shard.local_length(parallel.size), features_in))
        self.bias = nn.Parameter(torch.empty(shard.local_length(parallel.size)))
        mark_sharded(self.weight, shard, parallel.size)
        mark_sharded(self.bias, shard, parallel.size)
        self.weight_scale: Tensor | None
        self.register_buffer("weight_scale", None, persistent=False)

    def forward(self, *inputs: Tensor, ranges: Sequence[tuple[int, int]] | None = None) -> Any:
        """[..., C] -> [..., features_out / ranks].

        Or, with `ranges` (first and end block for every input, in ascending order where they differ), of each input
        the features of those blocks.
        """
        copies = [copy_to_ranks(x, self.parallel) for x in inputs]
        size = len(self.weight) // self.blocks
        spans = [slice(first * size, end * size) for first, end in ranges or [(0, self.blocks)]]
        parts = _BlockProducts.apply(self.weight, self.weight_scale, self.bias, spans, *copies)
        return parts if ranges else parts[0]


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
            multiply(rows.T, x.flatten(0, -2)) if of_weight else None,
            None,
            rows.sum(dim=0) if of_bias else None,
            None,
        )


def _summed_product(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor, parallel: TensorParallel
) -> Tensor:
    if parallel.size == 1:
        return weight_product(x, weight, weight_scale, bias)
    out = weight_product(x, weight, weight_scale)
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
