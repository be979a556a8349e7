"""Attention written out in fp64, and tensors to try it on.

Legend: B batch, L text length, F frame tokens, N heads, M key heads, D head dim, K = L + F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacog_kernels.grid import MaskSpec, VideoGrid, dense_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    """Inputs of one attention; q, k, v are strided views of one buffer, as a fused projection makes them."""

    mask: MaskSpec
    grid: VideoGrid
    q: Tensor
    k: Tensor
    v: Tensor
    text_q: Tensor
    text_k: Tensor
    text_v: Tensor
    text_valid: Tensor
    grad_out: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What gradients are for."""
        return self.q, self.k, self.v, self.text_k, self.text_v


def make_case(
    mask: MaskSpec,
    grid: VideoGrid,
    *,
    batch: int = 1,
    text: int = 5,
    heads: int = 2,
    key_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random tensors; the text is padded on the left by a random amount, up to all of it."""
    generator = torch.Generator().manual_seed(seed)

    def fused(rows: int) -> tuple[Tensor, ...]:
        counts = (heads, key_heads, key_heads)
        qkv = torch.randn(batch, rows, sum(counts) * head_dim, generator=generator).to(DEVICE, dtype)
        parts = qkv.split([count * head_dim for count in counts], dim=-1)
        return tuple(part.unflatten(-1, (-1, head_dim)) for part in parts)

    (q, k, v), (text_q, text_k, text_v) = fused(grid.tokens), fused(text)
    padding = torch.randint(0, text + 1, (batch, 1), generator=generator)
    valid = (torch.arange(text) >= padding).to(DEVICE)
    grad_out = torch.randn(q.shape, generator=generator).to(DEVICE, dtype)
    return Case(mask, grid, q, k, v, text_q, text_k, text_v, valid, grad_out)


@dataclass
class Expected:
    """fp64 results."""

    out: Tensor
    lse: Tensor
    text_out: Tensor
    gradients: tuple[Tensor, ...]


def expected(case: Case, text_factor: float = 1.0) -> Expected:
    """The definition: a softmax over all keys with masked scores at -inf; frame queries weigh text by a factor."""
    q, k, v, text_k, text_v = leaves = [part.detach().double().requires_grad_() for part in case.tensors]
    frames = torch.from_numpy(dense_mask(case.mask, case.grid).copy()).to(q.device)
    B, F = q.shape[:2]
    text = case.text_valid[:, None, :].expand(B, F, -1)
    allowed = torch.cat([text, frames.expand(B, F, F)], dim=2)
    factor = torch.ones_like(allowed, dtype=torch.float64)
    factor[..., : text.shape[2]] = text_factor
    out, lse = _softmax(q, torch.cat([text_k, k], dim=1), torch.cat([text_v, v], dim=1), allowed, factor)
    gradients = torch.autograd.grad(out, leaves, case.grad_out.double())
    own_text = case.text_valid[:, None, :].expand(B, text.shape[2], -1)
    text_out = _softmax(case.text_q.double(), text_k.detach(), text_v.detach(), own_text, torch.ones_like(own_text))[0]
    return Expected(out.detach(), lse.detach(), text_out, gradients)


def _softmax(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("brnd,bknd->bnrk", q, k) * q.shape[-1] ** -0.5
    scores = (scores + factor.log()[:, None]).masked_fill(~allowed[:, None], float("-inf"))
    weights = scores.softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("bnrk,bknd->brnd", weights, v), scores.logsumexp(dim=-1)


def error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN counts as infinite.

    Inputs are of order 1: results that cancel to nearly nothing are measured against 0.1 per element.
    """
    difference = (got.double() - wanted.double()).norm().item()
    size = max(wanted.double().norm().item(), 0.1 * max(wanted.numel(), 1) ** 0.5)
    return difference / size if difference == difference else float("inf")


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
