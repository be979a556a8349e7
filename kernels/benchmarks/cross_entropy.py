"""Linear head + cross entropy against its peers on one GPU: correctness first, then the same tensors in the same run.

    python launch/benchmark.py cross_entropy [--json FILE] [--check]

Every case is checked against fp64 before it is timed, and a wrong result ends the run. The loss is a weighted
sum of the rows' losses, forward and backward; times are medians in ms, peak is the memory above the inputs in MiB:

- megacog: `megacog_kernels.cross_entropy`
- eager: F.linear, then F.cross_entropy in fp32
- compiled: the same through torch.compile
- torch, chunked: F.linear_cross_entropy with its own chunks, where torch has it
- liger: LigerFusedLinearCrossEntropyFunction, where it can be imported
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from program import options, write_rows
from torch import Tensor
from torch.nn import functional as F

from megacog_kernels.cross_entropy import linear_logsumexp

LIMIT = 1e-2
"""Relative norm of the error of bf16 results."""


@dataclass(frozen=True)
class Case:
    """One head."""

    name: str
    rows: int
    width: int
    columns: int
    trained: bool
    """The head takes a gradient (base stage); otherwise the hidden states only."""


CASES = [
    Case("frozen head", 12800, 3072, 20000, trained=False),
    Case("trained head", 12800, 3072, 20000, trained=True),
]
TINY = [Case("tiny frozen", 9, 16, 70, trained=False), Case("tiny trained", 9, 16, 70, trained=True)]
"""To try the checks without a GPU."""


@dataclass
class Tensors:
    """Inputs, and the weight of every row's loss."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grad: Tensor

    @staticmethod
    def make(case: Case, device: str, dtype: torch.dtype) -> Tensors:
        """Random values of a fixed seed; logits have a standard deviation of 2."""
        torch.manual_seed(0)
        hidden = torch.randn(case.rows, case.width, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(case.columns, case.width, device=device).mul_(2 * case.width**-0.5).to(dtype)
        targets = torch.randint(case.columns, (case.rows,), device=device)
        return Tensors(hidden, weight.requires_grad_(case.trained), targets, torch.rand(case.rows, device=device))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(part for part in (self.hidden, self.weight) if part.requires_grad)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Loss of every row [X] from hidden states [X, C], weight [V, C] and targets [X]."""


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The kernels under test; asking for Triton, so that nothing else can be measured by mistake."""
    lse, target = linear_logsumexp(hidden, weight, targets, implementation="triton")
    return lse - target


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits, in fp32 at least for the loss."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own chunks, as it sizes them."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's fused head, with a loss per row."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    settings = (None, None, -100, 0.0, 0.0, "none")  # bias, weights of classes, ignored, z loss, smoothing, reduction
    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *settings)[0]


def peers() -> dict[str, Loss]:
    """Every implementation that is at hand."""
    found: dict[str, Loss] = {"megacog": ours, "eager": eager, "compiled": torch.compile(eager)}
    if hasattr(F, "linear_cross_entropy"):
        found["torch, chunked"] = chunked
    if importlib.util.find_spec("liger_kernel") is not None:
        found["liger"] = liger
    return found


def step(loss: Loss, tensors: Tensors) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Losses and gradients."""
    loss_X = loss(tensors.hidden, tensors.weight, tensors.targets)
    return loss_X, torch.autograd.grad(loss_X, tensors.leaves, tensors.grad.to(loss_X.dtype))


def check(case: Case, tensors: Tensors) -> float:
    """Largest relative error of losses and gradients.

    Raises:
        SystemExit: It is too large.
    """
    hidden, weight = (part.detach().double() for part in (tensors.hidden, tensors.weight))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_(case.trained)
    exact = Tensors(hidden, weight, tensors.targets, tensors.grad)
    loss, gradients = step(ours, tensors)
    exact_loss, exact_gradients = step(eager, exact)
    pairs = zip((loss, *gradients), (exact_loss, *exact_gradients), strict=True)
    worst = max(((got.double() - want).norm() / want.norm()).item() for got, want in pairs)
    if not worst <= LIMIT:
        sys.exit(f"error: {case.name}: relative error {worst:.2e} exceeds {LIMIT:.0e}; nothing was timed after it")
    return worst


def measure(case: Case, tensors: Tensors) -> list[dict]:
    """A row per implementation; one that fails says why instead of a time."""
    from triton.testing import do_bench

    rows: list[dict] = []
    for name, loss in peers().items():
        row: dict = {"case": case.name, "implementation": name}
        try:
            row["forward_backward_ms"] = do_bench(lambda: step(loss, tensors), return_mode="median")  # noqa: B023
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(loss, tensors)
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        except RuntimeError as error:
            row["failed"] = str(error).splitlines()[0]
        torch.cuda.empty_cache()
        rows.append(row)
        print(line(row, rows), flush=True)
    return rows


def line(row: dict, rows: list[dict]) -> str:
    """One line of the table, with how many times faster than this megacog is."""
    text = f"{row['case']:14s} {row['implementation']:16s}"
    if "failed" in row:
        return f"{text} {row['failed']}"
    ratio = row["forward_backward_ms"] / rows[0].get("forward_backward_ms", float("nan"))
    return f"{text} {row['forward_backward_ms']:9.3f} {row['peak_mib']:9.0f} {ratio:6.2f}x"


def main() -> None:
    args = options(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    if device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
        print(f"{'case':14s} {'implementation':16s} {'fwd+bwd':>9s} {'peak MiB':>9s}  this/megacog")
    for case in [case for case in (TINY if args.tiny else CASES) if args.only in case.name]:
        tensors = Tensors.make(case, device, torch.bfloat16)
        print(f"{case.name}: relative error {check(case, tensors):.1e}", flush=True)
        rows += measure(case, tensors) if not (args.check or args.tiny) else []
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
