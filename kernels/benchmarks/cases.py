"""Cases of the attention benchmarks: masks and grids that the goals are about, their tensors, and what is right."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megacog_kernels.attention import Implementation, attention
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid, visible

SAMPLED_ABOVE = 2500
"""Tokens of a grid from which on 128 of them are checked."""
LIMIT = 1e-2
"""Relative norm of the error of bf16 results."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    mask: MaskSpec
    grid: VideoGrid
    batch: int
    heads: int
    head_dim: int = 64
    text: int = 64
    backward: bool = True
    base: bool = False
    """Text rows are queries, too, and nothing of the text takes gradients."""


def local(frames: int, side: int, window: int, **more: int | bool) -> Case:
    """A local3d case over a square grid, all earlier frames."""
    mask = MaskSpec(Order.sequential(frames), Space("local3d", (window, window)))
    settings: dict = {"batch": 4, "heads": 48} | more
    return Case(f"local {window}x{window}, {frames}x{side}x{side}", mask, VideoGrid(frames, side, side), **settings)


def cases() -> list[Case]:
    """The masks and grids that the goals are about."""
    keys, sequential, interpolation = VideoGrid(5, 20, 20), Order.sequential(5), Order.interpolation(5)
    found = [Case("sequential full", MaskSpec(sequential, Space()), keys, 4, 48)]
    for shift in (0, 5):
        space = Space("shifted_window", (10, 10), shift=(shift, shift))
        found.append(Case(f"window 10, shift {shift}", MaskSpec(interpolation, space), keys, 4, 48))
    found.append(Case("base, own frame", MaskSpec(sequential, Space("frame")), keys, 4, 48, base=True))
    found += [local(16, 32, 9), local(16, 32, 11), local(16, 32, 17)]
    return [*found, local(32, 60, 17, batch=1, heads=8, head_dim=128, backward=False)]


def tiny() -> list[Case]:
    """Small ones, to try the checks without a GPU."""
    space = Space("shifted_window", (2, 2), shift=(1, 1))
    grid = VideoGrid(3, 3, 4)
    return [Case("tiny window", MaskSpec(Order.interpolation(3), space), grid, 1, 2, head_dim=16, text=3)]


@dataclass
class Tensors:
    """q, k, v of frames as thirds of a fused projection, and of the text."""

    q: Tensor
    k: Tensor
    v: Tensor
    text_q: Tensor
    text_k: Tensor
    text_v: Tensor
    grad_out: Tensor

    @staticmethod
    def make(case: Case, device: str, dtype: torch.dtype) -> Tensors:
        """Random values of a fixed seed."""
        torch.manual_seed(0)

        def fused(rows: int) -> tuple[Tensor, ...]:
            qkv = torch.randn(case.batch, rows, 3 * case.heads * case.head_dim, device=device, dtype=dtype)
            return tuple(part.unflatten(-1, (case.heads, case.head_dim)) for part in qkv.chunk(3, dim=-1))

        frames, text = fused(case.grid.tokens), fused(case.text)
        leaves = (part.detach().requires_grad_() for part in frames)
        text = tuple(part.detach().requires_grad_(not case.base) for part in text)
        return Tensors(*leaves, *text, torch.randn_like(frames[0]))

    @property
    def all(self) -> tuple[Tensor, ...]:
        """q, k, v, text_k, text_v."""
        return self.q, self.k, self.v, self.text_k, self.text_v

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Those that take gradients."""
        return tuple(part for part in self.all if part.requires_grad)


def forward(case: Case, tensors: Tensors, implementation: Implementation, deterministic: bool = True) -> Tensor:
    """The op under test: output of the frame rows. Of text rows too for the base channel."""
    q, k, v, text_k, text_v = tensors.all
    return attention(
        q, k, v, case.mask, case.grid, text_k=text_k, text_v=text_v, text_q=tensors.text_q if case.base else None,
        deterministic=deterministic, implementation=implementation,
    ).frames  # fmt: skip


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def check(case: Case, tensors: Tensors) -> float:
    """Largest relative error of output and gradients, in both modes; of sampled rows on large grids.

    Raises:
        SystemExit: It is too large, or deterministic gradients differ between three runs.
    """
    tokens = np.arange(case.grid.tokens)
    if case.grid.tokens > SAMPLED_ABOVE:
        tokens = np.sort(np.random.default_rng(0).choice(tokens, min(128, len(tokens) // 2), replace=False))
    worst, first = 0.0, None
    for deterministic in (True, True, True, False):
        out = forward(case, tensors, "triton", deterministic)
        grads = torch.autograd.grad(out, tensors.leaves, tensors.grad_out)
        if first is None:
            first = grads
        elif deterministic:
            if not all(torch.equal(*pair) for pair in zip(first, grads, strict=True)):
                sys.exit(f"error: {case.name}: gradients differ between runs")
            continue
        worst = max(worst, _error(case, tensors, out, grads, tokens))
    if not worst <= LIMIT:
        sys.exit(f"error: {case.name}: relative error {worst:.2e} exceeds {LIMIT:.0e}; nothing was timed after it")
    return worst


def _error(case: Case, tensors: Tensors, out: Tensor, grads: Sequence[Tensor], tokens: np.ndarray) -> float:
    """Largest relative error against fp64 in two heads of the first sample: all of `tokens`, and all of the text."""
    picked, worst = torch.from_numpy(tokens).to(out.device), 0.0
    for head in range(min(case.heads, 2)):
        q, k, v, text_k, text_v = (part[:1, :, head].detach().double() for part in tensors.all)
        grad_out, result = (part[:1, :, head].double() for part in (tensors.grad_out, out))
        keys, values = torch.cat([text_k, k], dim=1), torch.cat([text_v, v], dim=1)
        exact, grad_q, lse, delta = _by_query(case, q[:, picked], keys, values, grad_out[:, picked], tokens)
        pairs = [(result[:, picked], exact), (grads[0][:1, picked, head], grad_q)]
        if case.backward:
            if len(tokens) < case.grid.tokens:  # of every query: what gradients of keys need
                lse, delta = _statistics(case, q, keys, values, grad_out)
            grad_k, grad_v = _by_key(case, q, keys, values, grad_out, lse, delta, tokens)
            text = case.text
            pairs += [(grads[1][:1, picked, head], grad_k[:, text:]), (grads[2][:1, picked, head], grad_v[:, text:])]
            if not case.base:
                pairs += [(grads[3][:1, :, head], grad_k[:, :text]), (grads[4][:1, :, head], grad_v[:, :text])]
        worst = max(worst, *(relative(got, want) for got, want in pairs))
    return worst


def _scores(case: Case, q: Tensor, k: Tensor, queries: np.ndarray, keys: np.ndarray) -> Tensor:
    """fp64 scores of query tokens with the text and key tokens, -inf where masked."""
    allowed = torch.from_numpy(_allowed(case, queries, keys)).to(q.device)
    return (q @ k.mT * case.head_dim**-0.5).masked_fill(~allowed, float("-inf"))


def _by_query(
    case: Case, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, tokens: np.ndarray
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, gradient of q, log-sum-exp and delta of some query tokens."""
    scores = _scores(case, q, k, tokens, np.arange(case.grid.tokens))
    lse = scores.logsumexp(dim=-1, keepdim=True)
    weights = (scores - lse).exp()
    out = weights @ v
    delta = (out * grad_out).sum(dim=-1, keepdim=True)
    grad_scores = weights * (grad_out @ v.mT - delta)
    return out, grad_scores @ k * case.head_dim**-0.5, lse, delta


def _statistics(case: Case, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and delta of all query tokens, in blocks."""
    blocks = np.array_split(np.arange(case.grid.tokens), -(-case.grid.tokens // 1024))
    parts = [_by_query(case, q[:, block], k, v, grad_out[:, block], block)[2:] for block in blocks]
    lse, delta = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return lse, delta


def _by_key(
    case: Case, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, tokens: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values: of the text, then of some key tokens."""
    columns = torch.cat([torch.arange(case.text), case.text + torch.from_numpy(tokens)]).to(q.device)
    weights = (_scores(case, q, k[:, columns], np.arange(case.grid.tokens), tokens) - lse).exp()
    grad_scores = weights * (grad_out @ v[:, columns].mT - delta)
    return grad_scores.mT @ q * case.head_dim**-0.5, weights.mT @ grad_out


def _allowed(case: Case, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which query tokens see the text (all of it) and which key tokens: bool [Q, L + K]."""
    frame, cell = np.divmod(queries[:, None], case.grid.cells)
    key_frame, key_cell = np.divmod(keys[None], case.grid.cells)
    seen = visible(case.mask, case.grid, frame, cell, key_frame, key_cell)
    text = np.ones((len(queries), case.text), dtype=bool)
    return np.concatenate([text, np.broadcast_to(seen, (len(queries), len(keys)))], axis=1)
