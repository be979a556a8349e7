"""The attention kernels compiled for Hopper without a GPU, against the figures of docs/kernels.md.

The tool's other targets take minutes more; run it by hand when the kernels change.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "kernels/benchmarks/compile_attention.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TARGET = ("sm_90 bf16", ["--arch", "90", "--match", "bf16"])


def column(table: str) -> dict[tuple[str, ...], str]:
    """Kernel, mask and head dim -> figures of the target."""
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines())
    return {tuple(row[:3]): row[head.index(TARGET[0])] for row in rows}


def documented(triton: str) -> str:
    """The table of one Triton version."""
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    found = re.search(rf"^### Triton {re.escape(triton)}\n\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    assert found, f"docs/kernels.md has no table of Triton {triton}"
    return found[1]


def compile_all(cache: Path) -> str:
    """The table that the tool prints; fails where it finds a fault."""
    path = [str(ROOT), str(ROOT / "kernels")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(cache)}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, str(TOOL), *TARGET[1]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_the_installed_triton_compiles_what_is_documented(tmp_path: Path) -> None:
    assert column(compile_all(tmp_path)) == column(documented(version("triton")))
