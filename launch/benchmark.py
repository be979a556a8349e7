"""Measures megacog on this machine: `python launch/benchmark.py NAME [--help]`, the names of BENCHMARKS below."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = {
    "kernels": ROOT / "kernels/benchmarks/attention.py",
    "fused": ROOT / "kernels/benchmarks/fused.py",
    "tiles": ROOT / "kernels/benchmarks/sweep.py",
    "fp8_products": ROOT / "kernels/benchmarks/fp8_products.py",
    "cross_entropy": ROOT / "kernels/benchmarks/cross_entropy.py",
    "train": ROOT / "megacog/training/benchmark.py",
    "checkpoint": ROOT / "megacog/training/save_benchmark.py",
    "prepare": ROOT / "megacog/prepare/benchmark.py",
    "import": ROOT / "megacog/interop/benchmark.py",
    "generate": ROOT / "megacog/generation/benchmark.py",
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        print(f"usage: python launch/benchmark.py {{{','.join(BENCHMARKS)}}} [--help]", file=sys.stderr)
        sys.exit(0 if "--help" in sys.argv[1:] or "-h" in sys.argv[1:] else 2)
    script = BENCHMARKS[sys.argv.pop(1)]
    # Not the rooms of megacog: some of their modules have names of Python's own.
    beside = [] if script.is_relative_to(ROOT / "megacog") else [str(script.parent)]
    sys.path[:0] = [*beside, str(ROOT), str(ROOT / "kernels")]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
