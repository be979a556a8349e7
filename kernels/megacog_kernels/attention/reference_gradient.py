"""The reference with a backward pass that keeps queries, keys and values only.

Plain autograd would keep what attention makes of them on its way: keys and values joined anew for every frame, and
masks. The backward pass computes the attention again instead, a few percent of a layer's work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megacog_kernels.attention.reference import grouped_attention
from megacog_kernels.grid import MaskSpec, VideoGrid
from megacog_kernels.keep import kept


class ReferenceAttention(torch.autograd.Function):
    """`grouped_attention` of q, k, v, text_k, text_v, text_valid, mask, grid, scale and query frames."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, mask, grid, scale, queries = arguments
        ctx.rule = (mask, grid, scale, queries)
        ctx.save_for_backward(*tensors)
        (out,) = kept(lambda: (_forward(tensors, *ctx.rule),))
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, text_valid = ctx.saved_tensors
        needed = ctx.needs_input_grad[: len(tensors)]
        with torch.enable_grad():
            inputs = [part.detach().requires_grad_(want) for part, want in zip(tensors, needed, strict=True)]
            out = _forward([*inputs, text_valid], *ctx.rule)
        gradients = iter(torch.autograd.grad(out, [part for part in inputs if part.requires_grad], grad_out))
        return (*(next(gradients) if want else None for want in needed), *[None] * 5)


def _forward(
    tensors: list[Tensor], mask: MaskSpec, grid: VideoGrid, scale: float, queries: tuple[int, ...] | None
) -> Tensor:
    q, k, v, text_k, text_v, text_valid = tensors
    return grouped_attention(q, k, v, text_k, text_v, text_valid, mask, grid, scale, 0.0, False, queries)[0]
