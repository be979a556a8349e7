"""Attention against its peers on one GPU: correctness first, then medians of the same tensors in the same run.

    python launch/benchmark.py kernels [--json FILE] [--only TEXT] [--check]

Every case is checked before it is timed, and a wrong result ends the run. Times are medians in ms:

- megacog: `megacog_kernels.attention`, text and frames, the case's own mask
- cudnn: torch SDPA forced to cuDNN, dense causal over text + frames, what the kernels have to beat
- flex: FlexAttention (compiled) with the same mask, in raster order and in the plan's order
- reference: the plain torch ops, where their dense scores fit

"useful" counts 4 * D FLOPs per visible pair forward, 10 * D backward.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megacog_kernels.attention import attention
from megacog_kernels.attention.plan import tile_plan
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid, rule, visible

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
    found.append(Case("base, own frame", MaskSpec(sequential, Space("frame")), keys, 4, 48))
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

        (q, k, v), (_, text_k, text_v) = fused(case.grid.tokens), fused(case.text)
        leaves = (part.detach().requires_grad_() for part in (q, k, v, text_k, text_v))
        return Tensors(*leaves, torch.randn_like(q))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.text_k, self.text_v


def forward(case: Case, tensors: Tensors) -> Tensor:
    """The kernels under test; asking for Triton, so that nothing else can be measured by mistake."""
    q, k, v, text_k, text_v = tensors.leaves
    return attention(
        q, k, v, case.mask, case.grid, text_k=text_k, text_v=text_v, implementation="triton"
    ).frames  # fmt: skip


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def check(case: Case, tensors: Tensors) -> float:
    """Largest relative error of output and gradient of q in sampled rows, and of all gradients on small grids.

    Raises:
        SystemExit: It is too large.
    """
    small = case.grid.tokens <= 2500
    out = forward(case, tensors)
    grads = torch.autograd.grad(out, tensors.leaves, tensors.grad_out)
    rows = np.arange(case.grid.tokens)
    if not small:
        rows = np.sort(np.random.default_rng(0).choice(rows, 128, replace=False))
    picked = torch.from_numpy(rows).to(out.device)
    allowed = torch.from_numpy(_allowed(case, rows)).to(out.device)
    worst = 0.0
    for head in range(min(case.heads, 2)):
        q, *keys = (part[:1, :, head].detach().double() for part in tensors.leaves)
        leaves = [q[:, picked].requires_grad_(), *(part.requires_grad_() for part in keys)]
        exact = _exact(case, leaves, allowed)
        wanted = torch.autograd.grad(exact, leaves, tensors.grad_out[:1, picked, head].double())
        pairs = [(out[:1, picked, head], exact), (grads[0][:1, picked, head], wanted[0])]
        if small:
            pairs += [(got[:1, :, head], want) for got, want in zip(grads[1:], wanted[1:], strict=True)]
        worst = max(worst, *(relative(got, want) for got, want in pairs))
    if not worst <= LIMIT:
        sys.exit(f"error: {case.name}: relative error {worst:.2e} exceeds {LIMIT:.0e}; nothing was timed after it")
    return worst


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


Run = Callable[[], Tensor]


def peers(case: Case, tensors: Tensors) -> dict[str, tuple[Run, tuple[Tensor, ...], Tensor]]:
    """For every implementation: its forward pass, its leaves and its output's gradient."""
    joined = _joined(tensors, None)
    runs = {"megacog": (lambda: forward(case, tensors), tensors.leaves, tensors.grad_out)}

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*joined, is_causal=True)

    runs["cudnn"] = (cudnn, joined, torch.randn_like(joined[0]))
    plan = tile_plan(case.mask, case.grid, 64, 64)
    orders = {"flex": np.arange(case.grid.tokens), "flex, plan's order": plan.query.rows[plan.query.real]}
    for name, order in orders.items():
        runs[name] = _flex(case, tensors, order)
    if case.grid.tokens <= 2500:
        runs["reference"] = (lambda: _reference(case, tensors), tensors.leaves, tensors.grad_out)
    return runs


def _joined(tensors: Tensors, order: Tensor | None) -> tuple[Tensor, ...]:
    """q, k, v of text and frames in one sequence: [B, N, L + F, D], contiguous, frames in `order`."""
    text = (tensors.text_k, tensors.text_k, tensors.text_v)
    frames = [part if order is None else part[:, order] for part in (tensors.q, tensors.k, tensors.v)]
    joined = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(text, frames, strict=True))
    return tuple(part.detach().contiguous().requires_grad_() for part in joined)


def _flex(case: Case, tensors: Tensors, order: np.ndarray) -> tuple[Run, tuple[Tensor, ...], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = tensors.q.device
    token = torch.from_numpy(order.astype(np.int64)).to(device)
    joined = _joined(tensors, token)
    size = joined[0].shape[2]
    blocks = create_block_mask(flex_rule(case, token), None, None, size, size, device=str(device))
    compiled = torch.compile(flex_attention)
    return (lambda: compiled(*joined, block_mask=blocks)), joined, torch.randn_like(joined[0])


def flex_rule(case: Case, token: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's view of the mask over text, then frames in the order of `token` (int64 [F])."""
    mask, grid, L = case.mask, case.grid, case.text
    level = torch.tensor(mask.order.level, device=token.device)
    is_open = torch.tensor(mask.order.open, device=token.device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (f, p), (g, c) = (
            (at // grid.cells, at % grid.cells) for at in (token[(slot - L).clamp(min=0)] for slot in (query, key))
        )
        return (key < L) | ((query >= L) & rule(mask.space, grid, level, is_open, f, p, g, c))

    return sees


def _reference(case: Case, tensors: Tensors) -> Tensor:
    q, k, v, text_k, text_v = tensors.leaves
    return attention(
        q, k, v, case.mask, case.grid, text_k=text_k, text_v=text_v, implementation="reference"
    ).frames  # fmt: skip


def measure(case: Case, tensors: Tensors) -> list[dict]:
    """A row per implementation; one that fails says why instead of a time."""
    from triton.testing import do_bench

    rows = []
    plan = tile_plan(case.mask, case.grid, 64, 64)
    pairs = (plan.visible + case.grid.tokens * case.text) * case.batch * case.heads
    for name, (run, leaves, grad_out) in peers(case, tensors).items():
        row: dict = {"case": case.name, "implementation": name}
        try:
            with torch.no_grad():
                row["forward_ms"] = do_bench(run, return_mode="median")
            row["useful_tflops"] = pairs * 4 * case.head_dim / row["forward_ms"] / 1e9
            if case.backward:
                both = do_bench(lambda: torch.autograd.grad(run(), leaves, grad_out), return_mode="median")  # noqa: B023
                row["forward_backward_ms"] = both
        except RuntimeError as error:
            row["failed"] = str(error).splitlines()[0]
        torch.cuda.empty_cache()
        rows.append(row)
        print(line(row, rows), flush=True)
    return rows


def line(row: dict, rows: list[dict]) -> str:
    """One line of the table, with how many times faster than cuDNN's dense causal attention it is."""
    text = f"{row['case']:28s} {row['implementation']:20s}"
    if "failed" in row:
        return f"{text} {row['failed']}"
    text += f" {row['forward_ms']:9.3f} {row.get('forward_backward_ms', float('nan')):9.3f} {row['useful_tflops']:7.0f}"
    dense = next((other for other in rows if other["implementation"] == "cudnn"), {})
    ratios = (dense.get(key, 0) / row[key] for key in ("forward_ms", "forward_backward_ms") if key in row)
    return text + "".join(f" {ratio:6.2f}x" for ratio in ratios if ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--check", action="store_true", help="check results, time nothing")
    parser.add_argument("--tiny", action="store_true", help="check small cases, also on CPUs (TRITON_INTERPRET=1)")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("error: no CUDA device; --tiny with TRITON_INTERPRET=1 runs the checks on a CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = []
    if device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}")
        print(f"{'case':28s} {'implementation':20s} {'fwd ms':>9s} {'fwd+bwd':>9s} {'TFLOP/s':>7s}  cudnn/this")
    for case in tiny() if args.tiny else cases():
        if args.only in case.name:
            tensors = Tensors.make(case, device, dtype)
            print(f"{case.name}: relative error {check(case, tensors):.1e}", flush=True)
            rows += measure(case, tensors) if not (args.check or args.tiny) else []
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
