"""Fused pointwise ops against their peers on one GPU: correctness first, then medians of the same tensors.

    python launch/benchmark.py fused [--json FILE] [--only TEXT] [--check]

Every case is checked against fp64 before it is timed, and a wrong result ends the run. Times are medians in ms:

- megacog: the Triton kernels of `megacog_kernels`, where there are any
- eager: the plain torch reference
- compile: the same through torch.compile
- liger: Liger-Kernel's layernorm, where it is installed

GB/s are the bytes that the op must move at least (every tensor read or written once) over the time, and "copy" is
that over the rate of a copy of one of the tensors in the same run.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from program import options, write_rows
from torch import Tensor
from torch.nn import functional as F

from megacog_kernels.mix import mix
from megacog_kernels.norm import layer_norm, residual_norm, sandwich_norm

LIMIT = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""Relative norm of the error of results."""
ROWS, WIDTH, FFN_WIDTH = 16000, 3072, 12288
Op = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: str
    dtype: torch.dtype
    rows: int
    width: int
    ffn_width: int

    def rows_of(self, count: int, width: int | None = None) -> list[Tensor]:
        """Random rows."""
        shape = (self.rows, width or self.width)
        return [torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(count)]

    def vectors(self, count: int) -> list[Tensor]:
        """Random weights, one number per channel."""
        return [torch.randn(self.width, device=self.device, dtype=self.dtype) for _ in range(count)]


@dataclass(frozen=True)
class Case:
    """One op on one set of tensors."""

    name: str
    definition: Op
    """In plain torch."""
    ours: Op | None
    """None where eager torch is at the minimum of bytes, and we have no kernel."""
    inputs: list[Tensor]
    trained: int
    """How many of the inputs, from the first on, have gradients."""
    moves: tuple[int, int]
    """Tensors of the first input's size that forward and backward must read and write at least."""
    liger: Op | None = None

    def implementations(self) -> dict[str, Op]:
        """By name."""
        found = {"megacog": self.ours, "eager": self.definition, "compile": torch.compile(self.definition)}
        return {name: op for name, op in (found | {"liger": self.liger}).items() if op is not None}

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """The inputs, those that are trained with gradients."""
        return [part.detach().to(dtype).requires_grad_(i < self.trained) for i, part in enumerate(self.inputs)]


def norms(setting: Setting) -> Iterator[Case]:
    """The norms of a Sandwich-LN layer: frozen, as in the video stages, then trained."""
    x, y = setting.rows_of(2)
    weights = setting.vectors(4)
    liger = _liger_norm()

    def plain(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(y, weight, bias, implementation="reference")

    def residual(norm: Op) -> Op:
        return lambda x, y, weight, bias: x + norm(y, weight, bias)

    def sandwich(norm: Op) -> Op:
        def op(x: Tensor, y: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
            out = x + norm(y, *weights[:2])
            return out, norm(out, *weights[2:])

        return op

    for kind, frozen in (("frozen", True), ("trained", False)):
        for name, form, ours, inputs, moves in (
            ("layernorm", lambda norm: norm, layer_norm, [y, *weights[:2]], (2, 3)),
            ("residual norm", residual, residual_norm, [x, y, *weights[:2]], (3, 3)),
            ("sandwich norm", sandwich, sandwich_norm, [x, y, *weights], (4, 6)),
        ):
            trained = sum(part.dim() == 2 for part in inputs) if frozen else len(inputs)
            peer = None if liger is None else form(liger)
            yield Case(f"{name}, {kind}", form(plain), _triton(ours), inputs, trained, moves, peer)


def _liger_norm() -> Op | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


def _triton(op: Op) -> Op:
    """Asking for Triton, so that nothing else can be measured by mistake."""
    return lambda *inputs: op(*inputs, implementation="triton")


def mixes(setting: Setting) -> Iterator[Case]:
    """The mix of base channel and attention-plus."""
    inputs = [*setting.rows_of(2), *setting.vectors(1)]
    yield Case("mix", lambda *inputs: mix(*inputs, implementation="reference"), _triton(mix), inputs, 3, (3, 5))


def activations(setting: Setting) -> Iterator[Case]:
    """GELU of the MLP. The bias is added by the matrix product before it."""
    gelu = setting.rows_of(1, setting.ffn_width)
    yield Case("gelu", lambda x: F.gelu(x, approximate="tanh"), None, gelu, 1, (2, 3))


SECTIONS: tuple[Callable[[Setting], Iterator[Case]], ...] = (norms, mixes, activations)


def run(op: Op, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """All outputs."""
    out = op(*leaves)
    return (out,) if isinstance(out, Tensor) else tuple(out)


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Of all leaves that have one."""
    return torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf.requires_grad], grads)


def grads_of(case: Case, outputs: int) -> list[Tensor]:
    """Random gradients of the outputs, which all have the shape of the first input."""
    return [torch.randn_like(case.inputs[0]) for _ in range(outputs)]


def check(case: Case) -> float:
    """Largest relative error of our outputs and gradients against fp64.

    Raises:
        SystemExit: It is too large.
    """
    assert case.ours is not None
    leaves, exact = case.leaves(case.inputs[0].dtype), case.leaves(torch.float64)
    got, wanted = run(case.ours, leaves), run(case.definition, exact)
    grads = grads_of(case, len(got))
    got += gradients(got, leaves, grads)
    wanted += gradients(wanted, exact, [grad.double() for grad in grads])
    pairs = zip(got, wanted, strict=True)
    worst = max(((mine.double() - theirs).norm() / theirs.norm()).item() for mine, theirs in pairs)
    limit = LIMIT[case.inputs[0].dtype]
    if not worst <= limit:
        sys.exit(f"error: {case.name}: relative error {worst:.2e} exceeds {limit:.0e}; nothing was timed after it")
    return worst


def measure(case: Case, copy_rate: float) -> list[dict]:
    """A row per implementation; one that fails says why instead of a time."""
    from triton.testing import do_bench

    size = case.inputs[0].nbytes
    rows = []
    for name, op in case.implementations().items():
        leaves = case.leaves(case.inputs[0].dtype)
        row: dict = {"case": case.name, "implementation": name}
        try:
            with torch.no_grad():
                row["forward_ms"] = do_bench(lambda: run(op, leaves), return_mode="median")  # noqa: B023
            grads = grads_of(case, len(run(op, leaves)))
            both = do_bench(lambda: gradients(run(op, leaves), leaves, grads), return_mode="median")  # noqa: B023
            row["forward_backward_ms"] = both
            for key, moves in (("forward", case.moves[0]), ("forward_backward", sum(case.moves))):
                row[f"{key}_gb_s"] = moves * size / row[f"{key}_ms"] / 1e6
                row[f"{key}_of_copy"] = row[f"{key}_gb_s"] / copy_rate
        except RuntimeError as error:
            row["failed"] = str(error).splitlines()[0]
        torch.cuda.empty_cache()
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict) -> str:
    """One line of the table."""
    text = f"{row['case']:24s} {row['implementation']:10s}"
    if "failed" in row:
        return f"{text} {row['failed']}"
    for key in ("forward", "forward_backward"):
        text += f" {row[f'{key}_ms']:9.3f} {row[f'{key}_gb_s']:7.0f} {row[f'{key}_of_copy']:6.0%}"
    return text


def copy_rate(setting: Setting) -> float:
    """GB/s of a copy: bytes read plus bytes written."""
    from triton.testing import do_bench

    source, target = setting.rows_of(2)
    return 2 * source.nbytes / do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


def main() -> None:
    args = options(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    setting = Setting(device, dtype, *((5, 24, 96) if args.tiny else (ROWS, WIDTH, FFN_WIDTH)))
    timed = not (args.check or args.tiny)
    rows: list[dict] = []
    rate = copy_rate(setting) if timed else 0.0
    if timed:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}")
        print(f"{setting.rows} rows, width {setting.width} (gelu {setting.ffn_width}); a copy moves {rate:.0f} GB/s")
        rates = f"{'GB/s':>7s} {'copy':>6s}"
        print(f"{'case':24s} {'':10s} {'fwd ms':>9s} {rates} {'fwd+bwd':>9s} {rates}")
    for case in (case for section in SECTIONS for case in section(setting) if args.only in case.name):
        if case.ours is not None:
            print(f"{case.name}: relative error {check(case):.1e}", flush=True)
        rows += measure(case, rate) if timed else []
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
