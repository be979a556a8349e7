"""Products with frozen e4m3 weights against bf16 ones on a GPU: correctness first, then the same rows in one run.

    python launch/benchmark.py fp8_products [--json FILE] [--check]

Forward is rows @ weight^T, backward the gradient of the rows; the weight is quantized before, the rows within what is
timed. Every case is checked against fp64 before it is timed, and a wrong result ends the run. Times are medians in ms:

- bf16: torch.mm
- fast: e4m3, tensor cores add up in fewer bits than fp32
- exact: e4m3, sums in fp32

`megacog_kernels.fp8` takes `fast` forward and `exact` backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from program import options, write_rows
from torch import Tensor

from megacog_kernels.fp8 import fp8_product, quantize_rows, transposed

LIMIT = 6e-2
"""Relative norm of the error: e4m3 keeps 3 bits behind the point, of rows and of weights."""
WIDTH, ROWS = 3072, 8 * 2000


@dataclass(frozen=True)
class Case:
    """One product of the 9B model."""

    name: str
    rows: int
    inner: int
    outer: int


CASES = [
    Case("qkv", ROWS, WIDTH, 3 * WIDTH),
    Case("dense", ROWS, WIDTH, WIDTH),
    Case("up", ROWS, WIDTH, 4 * WIDTH),
    Case("down", ROWS, 4 * WIDTH, WIDTH),
    Case("qkv, 2 rows", 2, WIDTH, 3 * WIDTH),
    Case("qkv, 16 rows", 16, WIDTH, 3 * WIDTH),
    Case("qkv, 32 rows", 32, WIDTH, 3 * WIDTH),
]
TINY = [Case("tiny", 5, 32, 48)]
"""To try the checks without a GPU."""

Product = Callable[[Tensor], Tensor]


def products(case: Case, device: str) -> dict[str, tuple[Tensor, dict[str, Product]]]:
    """Direction -> rows, and what multiplies them."""
    torch.manual_seed(0)
    weight_NK = torch.randn(case.outer, case.inner, device=device).mul_(case.inner**-0.5).bfloat16()
    codes_NK, scale_N1 = quantize_rows(weight_NK)
    turned_KN, scale_N = transposed(codes_NK), scale_N1.flatten()
    ones_K = scale_N.new_ones(case.inner)

    def forward(fast: bool) -> Product:
        return lambda rows: fp8_product(*quantize_rows(rows), codes_NK, scale_N, fast=fast)

    def backward(fast: bool) -> Product:
        return lambda rows: fp8_product(*quantize_rows(rows, scale_N), turned_KN, ones_K, fast=fast)

    def rows(width: int) -> Tensor:
        return torch.randn(case.rows, width, device=device).bfloat16()

    def of(bf16: Product, fp8: Callable[[bool], Product]) -> dict[str, Product]:
        return {"bf16": bf16, "fast": fp8(True), "exact": fp8(False)}

    return {
        "forward": (rows(case.inner), of(lambda x: x @ weight_NK.t(), forward)),
        "backward": (rows(case.outer), of(lambda x: x @ weight_NK, backward)),
    }


def check(case: Case, direction: str, rows: Tensor, ways: dict[str, Product]) -> list[dict]:
    """A row per way with the relative error of its result against the bf16 matrices in fp64.

    Raises:
        SystemExit: It is too large.
    """
    first = min(case.rows, 512)  # rows do not meet each other
    weight = ways["bf16"](torch.eye(rows.shape[1], device=rows.device, dtype=rows.dtype)).double()
    exact = rows[:first].double() @ weight
    found = []
    for name, multiply in ways.items():
        error = ((multiply(rows[:first]).double() - exact).norm() / exact.norm()).item()
        if not error <= LIMIT:
            sys.exit(f"error: {case.name}, {direction}, {name}: relative error {error:.2e} exceeds {LIMIT:.0e}")
        found.append({"case": case.name, "direction": direction, "way": name, "error": error})
    return found


def measure(case: Case, rows: Tensor, ways: dict[str, Product], found: list[dict]) -> None:
    """Add times and TFLOP/s to the rows of `check`."""
    from triton.testing import do_bench

    for row in found:
        multiply = ways[row["way"]]
        row["ms"] = do_bench(lambda: multiply(rows), return_mode="median")  # noqa: B023
        row["tflops"] = 2 * case.rows * case.inner * case.outer / row["ms"] / 1e9


def line(row: dict, bf16: dict) -> str:
    """One line of the table, with how many times faster than bf16 it is."""
    if "ms" not in row:
        return f"{row['case']}, {row['direction']}, {row['way']}: relative error {row['error']:.1e}"
    text = f"{row['case']:14s} {row['direction']:9s} {row['way']:6s} {row['error']:9.1e}"
    return f"{text} {row['ms']:8.4f} {row['tflops']:8.1f} {bf16['ms'] / row['ms']:6.2f}x"


def main() -> None:
    args = options(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        print(f"{'case':14s} {'':9s} {'way':6s} {'error':>9s} {'ms':>8s} {'TFLOP/s':>8s}  bf16/this")
    rows = []
    for case in [case for case in (TINY if args.tiny else CASES) if args.only in case.name]:
        for direction, (matrix, ways) in products(case, device).items():
            found = check(case, direction, matrix, ways)
            if device == "cuda" and not (args.check or args.tiny):
                measure(case, matrix, ways, found)
            print("\n".join(line(row, found[0]) for row in found), flush=True)
            rows += found
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
