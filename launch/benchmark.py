"""Measures megacog on this machine, one part each: `python launch/benchmark.py NAME [--help]`."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = {
    "kernels": ("kernels/benchmarks/attention.py", "attention kernels: exactness, time, useful TFLOP/s"),
    "fused": ("kernels/benchmarks/fused.py", "norms and gates: time and bytes per second"),
    "tiles": ("kernels/benchmarks/sweep.py", "attention kernels over tile sizes"),
    "fp8_products": ("kernels/benchmarks/fp8_products.py", "products in e4m3 against bf16"),
    "cross_entropy": ("kernels/benchmarks/cross_entropy.py", "head and loss: time and memory"),
    "train": ("megacog/training/benchmark.py", "training steps: time, memory against the plan, shares of a profile"),
    "checkpoint": ("megacog/training/save_benchmark.py", "what writing checkpoints costs a run"),
    "prepare": ("megacog/prepare/benchmark.py", "preparation: clips per second by part"),
    "import": ("megacog/interop/benchmark.py", "a checkpoint of the original's format: time and memory of its import"),
    "generate": ("megacog/generation/benchmark.py", "decoding: tokens per second and bytes moved"),
}
"""Name -> program from the repository's root, help."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, (_, what) in BENCHMARKS.items():
        commands.add_parser(name, help=what, add_help=False)
    script = ROOT / BENCHMARKS[parser.parse_args(sys.argv[1:2]).name][0]
    del sys.argv[1]
    # Not the rooms of megacog: some of their modules have names of Python's own.
    beside = [] if script.is_relative_to(ROOT / "megacog") else [str(script.parent)]
    sys.path[:0] = [*beside, str(ROOT), str(ROOT / "kernels")]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
