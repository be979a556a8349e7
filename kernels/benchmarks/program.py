"""What the benchmarks share as programs: options, the look for a GPU, and the file of rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def options(description: str | None, checks: bool = True) -> argparse.Namespace:
    """json, only, check and tiny from the command line; without `checks` only times matter, and only the first two.

    Raises:
        SystemExit: There is no CUDA device, and one is needed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--only", default="", help="part of a case's name")
    if checks:
        parser.add_argument("--check", action="store_true", help="check results, time nothing")
        parser.add_argument("--tiny", action="store_true", help="check small cases, also on CPUs (TRITON_INTERPRET=1)")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not (checks and args.tiny):
        hint = "; --tiny with TRITON_INTERPRET=1 runs the checks on a CPU" if checks else ", and only times matter here"
        sys.exit(f"error: no CUDA device{hint}")
    return args


def write_rows(path: Path | None, rows: Sequence[dict]) -> None:
    """Replace the file of rows, if one was asked for."""
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
