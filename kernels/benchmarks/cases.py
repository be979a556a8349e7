"""Cases of the attention benchmarks: masks and grids that the goals are about, their tensors, and what is right."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megacog_kernels.attention import Implementation, attention
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid, visible

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
    settings: dict = {"batch": 1, "heads": 48} | more
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
    return [*found, local(32, 60, 17, heads=8, head_dim=128, backward=False)]


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
    """Largest relative error of output and gradient of q in sampled rows, and of all gradients on small grids.

    Raises:
        SystemExit: It is too large.
    """
    small = case.grid.tokens <= 2500
    out = forward(case, tensors, "triton")
    grads = torch.autograd.grad(out, tensors.leaves, tensors.grad_out)
    if any(not torch.equal(*pair) for pair in zip(grads, _repeated(case, tensors), strict=True)):
        sys.exit(f"error: {case.name}: gradients differ between two runs")
    rows = np.arange(case.grid.tokens)
    if not small:
        rows = np.sort(np.random.default_rng(0).choice(rows, 128, replace=False))
    picked = torch.from_numpy(rows).to(out.device)
    allowed = torch.from_numpy(_allowed(case, rows)).to(out.device)
    worst = 0.0
    for head in range(min(case.heads, 2)):
        q, *keys = (part[:1, :, head].detach().double() for part in tensors.all)
        leaves = [q[:, picked].requires_grad_(), *(part.requires_grad_() for part in keys)]
        exact = _exact(case, leaves, allowed)
        wanted = torch.autograd.grad(exact, leaves, tensors.grad_out[:1, picked, head].double())
        pairs = [(out[:1, picked, head], exact), (grads[0][:1, picked, head], wanted[0])]
        if small:
            pairs += [(got[:1, :, head], want) for got, want in zip(grads[1:], wanted[1 : len(grads)], strict=True)]
        worst = max(worst, *(relative(got, want) for got, want in pairs))
    if not worst <= LIMIT:
        sys.exit(f"error: {case.name}: relative error {worst:.2e} exceeds {LIMIT:.0e}; nothing was timed after it")
    return worst


def _repeated(case: Case, tensors: Tensors) -> tuple[Tensor, ...]:
    return torch.autograd.grad(forward(case, tensors, "triton"), tensors.leaves, tensors.grad_out)


def _allowed(case: Case, rows: np.ndarray) -> np.ndarray:
    frame, cell = np.divmod(rows[:, None], case.grid.cells)
    key_frame, key_cell = np.divmod(np.arange(case.grid.tokens)[None], case.grid.cells)
    seen = np.broadcast_to(
        visible(case.mask, case.grid, frame, cell, key_frame, key_cell), (len(rows), case.grid.tokens)
    )
    return np.concatenate([np.ones((len(rows), case.text), dtype=bool), seen], axis=1)


def _exact(case: Case, leaves: list[Tensor], allowed: Tensor) -> Tensor:
    q, k, v, text_k, text_v = leaves
    scores = q @ torch.cat([text_k, k], dim=1).mT * case.head_dim**-0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1) @ torch.cat([text_v, v], dim=1)
