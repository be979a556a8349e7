"""Attention against its peers on one GPU: correctness first, then medians of the same tensors in the same run.

    python launch/benchmark.py kernels [--json FILE] [--only TEXT] [--check]

Every case is checked before it is timed, and a wrong result ends the run. Times are medians in ms:

- megacog: `megacog_kernels.attention`, the case's own mask; "fast" lets gradients of q be summed in any order
- cudnn: torch SDPA forced to cuDNN, dense causal over text + frames, what the kernels have to beat
- flash: FlashAttention, dense causal, if it is installed
- flex: FlexAttention (compiled) with the same mask, in raster order and in the plan's order
- reference: the plain torch ops, where their dense scores fit

"useful" counts 4 * D FLOPs per visible pair forward. "extra" is the memory that forward and backward took at their
peak beyond q, k, v, output and gradients, in percent of these. At the end stand the goals of docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import mean

import numpy as np
import torch
from cases import Case, Tensors, cases, check, forward, tiny
from program import options, write_rows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megacog_kernels.attention.plan import tile_plan
from megacog_kernels.grid import rule

Run = Callable[[], Tensor]
Peer = tuple[Run, tuple[Tensor, ...], Tensor]
"""A forward pass, its leaves and its output's gradient."""


def peers(case: Case, tensors: Tensors) -> dict[str, Callable[[], Peer]]:
    """How to make every implementation: one at a time, for memory's sake."""
    mine = (tensors.leaves, tensors.grad_out)
    plan = tile_plan(case.mask, case.grid, 64, 64)
    made: dict[str, Callable[[], Peer]] = {
        "cudnn": lambda: _cudnn(tensors),
        "megacog": lambda: (lambda: forward(case, tensors, "triton"), *mine),
        "megacog, fast": lambda: (lambda: forward(case, tensors, "triton", deterministic=False), *mine),
        "flex": lambda: _flex(case, tensors, np.arange(case.grid.tokens)),
        "flex, plan's order": lambda: _flex(case, tensors, plan.query.rows[plan.query.real]),
    }
    if find_spec("flash_attn"):
        made["flash, dense"] = lambda: _flash(tensors)
    if case.grid.tokens <= 2500:
        made["reference"] = lambda: (lambda: forward(case, tensors, "reference"), *mine)
    return made


def _cudnn(tensors: Tensors) -> Peer:
    joined = _joined(tensors, None)

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*joined, is_causal=True)

    return run, joined, torch.randn_like(joined[0])


def _flash(tensors: Tensors) -> Peer:
    from flash_attn import flash_attn_func

    joined = tuple(part.detach().transpose(1, 2).contiguous().requires_grad_() for part in _joined(tensors, None))
    return (lambda: flash_attn_func(*joined, causal=True)), joined, torch.randn_like(joined[0])


def _joined(tensors: Tensors, order: Tensor | None) -> tuple[Tensor, ...]:
    """q, k, v of text and frames in one sequence: [B, N, L + F, D], contiguous, frames in `order`."""
    text = (tensors.text_q, tensors.text_k, tensors.text_v)
    frames = [part if order is None else part[:, order] for part in (tensors.q, tensors.k, tensors.v)]
    joined = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(text, frames, strict=True))
    return tuple(part.detach().contiguous().requires_grad_() for part in joined)


def _flex(case: Case, tensors: Tensors, order: np.ndarray) -> Peer:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = tensors.q.device
    token = torch.from_numpy(order.astype(np.int64)).to(device)
    joined = _joined(tensors, token)
    size = joined[0].shape[2]
    torch._dynamo.reset()  # else the cases before count against its limit of compilations, and it runs unfused
    blocks = create_block_mask(flex_rule(case, token), None, None, size, size, device=str(device), _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return (lambda: compiled(*joined, block_mask=blocks)), joined, torch.randn_like(joined[0])


def flex_rule(case: Case, token: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's view of the mask over text, then frames in the order of `token` (int64 [F])."""
    mask, grid, L = case.mask, case.grid, case.text
    level = torch.tensor(mask.order.level, device=token.device)
    is_open = torch.tensor(mask.order.open, device=token.device)
    slots = torch.cat([token.new_zeros(L), token])  # text slots are never asked for their frame
    frame, cell = slots // grid.cells, slots % grid.cells

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = rule(mask.space, grid, level, is_open, frame[query], cell[query], frame[key], cell[key])
        return (key < L) | ((query >= L) & seen)

    return sees


def measure(case: Case, tensors: Tensors) -> list[dict]:
    """A row per implementation; one that fails says why instead of a time."""
    from triton.testing import do_bench

    rows = []
    plan = tile_plan(case.mask, case.grid, 64, 64)
    pairs = (plan.visible + case.grid.tokens * case.text) * case.batch * case.heads
    for name, make in peers(case, tensors).items():
        row: dict = {"case": case.name, "implementation": name}
        try:
            run, leaves, grad_out = make()
            with torch.no_grad():
                row["forward_ms"] = do_bench(run, return_mode="median")
            row["useful_tflops"] = pairs * 4 * case.head_dim / row["forward_ms"] / 1e9
            if case.backward:
                both = partial(_forward_backward, run, leaves, grad_out)
                row["forward_backward_ms"] = do_bench(both, return_mode="median")
                row["extra_memory"] = extra_memory(run, leaves, grad_out)
        except Exception as error:  # whatever it is: the others are to be measured
            row["failed"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        run = leaves = grad_out = None
        torch.cuda.empty_cache()
        rows.append(row)
        print(line(row, rows), flush=True)
    return rows


def _forward_backward(run: Run, leaves: tuple[Tensor, ...], grad_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(), leaves, grad_out)


def extra_memory(run: Run, leaves: tuple[Tensor, ...], grad_out: Tensor) -> float:
    """Peak of forward and backward beyond leaves, output, its gradient and gradients, as a share of these."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(run(), leaves, grad_out)
    made = torch.cuda.max_memory_allocated() - before
    leaf_bytes = sum(part.nbytes for part in leaves)
    needed = leaf_bytes + grad_out.nbytes  # gradients and output, which were made
    return (made - needed) / (needed + leaf_bytes + grad_out.nbytes)


def line(row: dict, rows: list[dict]) -> str:
    """One line of the table, with how many times faster than cuDNN's dense causal attention it is."""
    text = f"{row['case']:28s} {row['implementation']:20s}"
    if "failed" in row:
        return f"{text} {row['failed']}"
    text += f" {row['forward_ms']:9.3f} {row.get('forward_backward_ms', float('nan')):9.3f} {row['useful_tflops']:7.0f}"
    if "extra_memory" in row:
        text += f" {100 * row['extra_memory']:5.1f} %"
    else:
        text += " " * 8
    dense = next((other for other in rows if other["implementation"] == "cudnn"), {})
    ratios = (dense.get(key, 0) / row[key] for key in ("forward_ms", "forward_backward_ms") if key in row)
    return text + "".join(f" {ratio:6.2f}x" for ratio in ratios if ratio)


def matmul_rate() -> float:
    """TFLOP/s of an 8192^3 matrix product."""
    from triton.testing import do_bench

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / do_bench(lambda: a @ b, return_mode="median") / 1e9


def goals(rows: list[dict], matmul: float) -> list[str]:
    """A line per goal whose cases were measured: what was reached, and whether that is enough."""
    times = {(row["case"], row["implementation"]): row for row in rows if "failed" not in row}

    def total(case: str, implementation: str) -> float:
        return float(times[case, implementation]["forward_backward_ms"])

    def forward_ms(case: str, implementation: str) -> float:
        return float(times[case, implementation]["forward_ms"])

    def backward(case: str, implementation: str) -> float:
        return total(case, implementation) - forward_ms(case, implementation)

    def flex(case: str) -> float:
        return min(total(case, name) for name in ("flex", "flex, plan's order") if (case, name) in times)

    full, windows, base = "sequential full", ("window 10, shift 0", "window 10, shift 5"), "base, own frame"
    near, mid, far = "local 9x9, 16x32x32", "local 11x11, 16x32x32", "local 17x17, 32x60x60"
    trained = {case for case, name in times if "forward_backward_ms" in times[case, name] and name == "megacog"}
    wanted: list[tuple[str, bool, float, Callable[[], float]]] = [
        (f"{full}: forward / cuDNN", False, 1.10, lambda: forward_ms(full, "megacog") / forward_ms(full, "cudnn")),
        (f"{full}: backward / cuDNN", False, 1.25, lambda: backward(full, "megacog") / backward(full, "cudnn")),
        (f"{full}: fast backward / cuDNN", False, 1.25,
         lambda: backward(full, "megacog, fast") / backward(full, "cudnn")),
        ("window 10, both shifts: cuDNN / ours", True, 1.8,
         lambda: mean(total(case, "cudnn") for case in windows) / mean(total(case, "megacog") for case in windows)),
        ("window 10, both shifts: best flex / ours", True, 1.5,
         lambda: mean(flex(case) for case in windows) / mean(total(case, "megacog") for case in windows)),
        (f"{base}: cuDNN / ours", True, 2.0, lambda: total(base, "cudnn") / total(base, "megacog")),
        (f"{near}: cuDNN / ours", True, 3.0, lambda: total(near, "cudnn") / total(near, "megacog")),
        (f"{mid}: cuDNN / ours", True, 2.5, lambda: total(mid, "cudnn") / total(mid, "megacog")),
        (f"{far}, d128: useful / matmul", True, 0.25, lambda: times[far, "megacog"]["useful_tflops"] / matmul),
        ("deterministic / fast backward, worst", False, 1.5,
         lambda: max(backward(case, "megacog") / backward(case, "megacog, fast") for case in trained)),
        ("extra memory, worst", False, 0.05, lambda: max(times[case, "megacog"]["extra_memory"] for case in trained)),
    ]  # fmt: skip
    lines = []
    for name, more_is_better, limit, reach in wanted:
        try:
            value = reach()
        except (KeyError, ValueError):
            continue  # not measured in this run
        met = value >= limit if more_is_better else value <= limit
        sign = ">=" if more_is_better else "<="
        lines.append(f"{name:48s} {value:6.2f}  goal {sign} {limit:g}  {'reached' if met else 'MISSED'}")
    return lines


def main() -> None:
    args = options(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows: list[dict] = []
    if device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}")
        columns = f"{'fwd ms':>9s} {'fwd+bwd':>9s} {'useful':>7s} {'extra':>7s}  cudnn/this"
        print(f"{'case':28s} {'implementation':20s} {columns}")
    for case in tiny() if args.tiny else cases():
        if args.only in case.name:
            tensors = Tensors.make(case, device, dtype)
            print(f"{case.name}: relative error {check(case, tensors):.1e}", flush=True)
            rows += measure(case, tensors) if not (args.check or args.tiny) else []
            write_rows(args.json, rows)  # after every case: a later one may fail
    if rows:
        rate = matmul_rate()
        print(f"8192^3 matmul: {rate:.0f} TFLOP/s\n\n" + "\n".join(goals(rows, rate)))
        rows.append({"matmul_tflops": rate})
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
