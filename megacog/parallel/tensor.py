"""Tensor parallelism: the group of ranks that share one copy of the model, and its collectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among the ranks that hold the model together."""

    rank: int = 0
    size: int = 1
    group: Any = None


@dataclass(frozen=True)
class ShardSpec:
    """How a whole tensor is cut over tensor-parallel ranks.

    Dimension `dim` is `blocks` equal blocks (3 for q|k|v); every rank holds an equal part of each.
    `length` is the whole length; it is padded with zeros when it does not divide.
    """

    dim: int
    length: int
    blocks: int = 1

    def local_length(self, size: int) -> int:
        """Rows (or columns) that one of `size` ranks holds."""
        return self.blocks * -(-self.length // (self.blocks * size))

    def slice(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """The part of `whole` that `rank` of `size` holds, zero padded; a view where it can be."""
        if size == 1:
            return whole
        missing = self.local_length(size) * size - whole.shape[self.dim]
        if missing:
            shape = list(whole.shape)
            shape[self.dim] = missing
            whole = torch.cat([whole, whole.new_zeros(shape)], dim=self.dim)
        parts = [block.chunk(size, self.dim)[rank] for block in whole.chunk(self.blocks, self.dim)]
        return parts[0] if self.blocks == 1 else torch.cat(parts, dim=self.dim)

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor from every rank's part, padding removed."""
        if len(parts) == 1:
            return parts[0]
        blocks = [part.chunk(self.blocks, self.dim) for part in parts]
        whole = torch.cat([blocks[r][b] for b in range(self.blocks) for r in range(len(parts))], dim=self.dim)
        return whole.narrow(self.dim, 0, self.length)


def mark_sharded(parameter: Tensor, shard: ShardSpec, size: int) -> None:
    """Attach the shard to a parameter; DeepSpeed's gradient norm reads `tensor_model_parallel`."""
    parameter.shard = shard  # type: ignore[attr-defined]
    if size > 1:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def materialize(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Give a module built on the meta device uninitialized memory; the marks of its parameters survive."""
    marks = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
    module = module.to(dtype).to_empty(device=device)
    for name, parameter in module.named_parameters():
        vars(parameter).update(marks[name])
    return module


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _GatherFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: TensorParallel) -> Tensor:
        ctx.rank = parallel.rank
        parts = x.new_empty(parallel.size, *x.shape)
        dist.all_gather(list(parts.unbind()), x.contiguous(), group=parallel.group)
        return parts

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad[ctx.rank], None


def copy_to_ranks(x: Tensor, parallel: TensorParallel) -> Tensor:
    """x itself; its gradient is summed over the tensor-parallel ranks."""
    return x if parallel.size == 1 else _CopyToRanks.apply(x, parallel.group)


def sum_over_ranks(x: Tensor, parallel: TensorParallel) -> Tensor:
    """The sum of x over the tensor-parallel ranks; the gradient passes unchanged."""
    return x if parallel.size == 1 else _SumOverRanks.apply(x, parallel.group)


def gather_from_ranks(x: Tensor, parallel: TensorParallel) -> Tensor:
    """Every tensor-parallel rank's x, [ranks, ...]; each rank takes the gradient of its own.

    What follows must be the same on every rank.
    """
    return x.unsqueeze(0) if parallel.size == 1 else _GatherFromRanks.apply(x, parallel)
