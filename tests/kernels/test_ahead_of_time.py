"""Every kernel that dispatch can pick, compiled without a GPU, against the figures of docs/kernels.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "kernels/benchmarks/compile_attention.py"
DEVICE_TRITON = "3.6.0"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def documented(triton: str) -> str | None:
    """The table of one Triton version."""
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    found = re.search(rf"^### Triton {re.escape(triton)}\n\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    return found[1].strip() if found else None


def compile_all(cache: Path, *first_on_path: Path) -> str:
    """The table that the tool prints; fails where it finds a fault."""
    path = [*map(str, first_on_path), str(ROOT), str(ROOT / "kernels")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(cache)}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, str(TOOL)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_the_installed_triton_compiles_what_is_documented(tmp_path: Path) -> None:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    table = compile_all(tmp_path)
    known = documented(version("triton"))
    assert known is None or table == known, f"write this into docs/kernels.md:\n{table}"


def test_the_triton_of_the_device_compiles_what_is_documented(tmp_path: Path) -> None:
    aside = tmp_path / "triton"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(aside)]
    done = subprocess.run([*install, f"triton=={DEVICE_TRITON}"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"triton {DEVICE_TRITON} cannot be installed here: {done.stderr[-200:]}")
    table = compile_all(tmp_path / "cache", aside)
    known = documented(DEVICE_TRITON)
    assert known is None or table == known, f"write this into docs/kernels.md:\n{table}"
