"""Every kernel that dispatch can pick, compiled without a GPU, against the figures of docs/kernels.md."""

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
DEVICE_TRITON = "3.6.0"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def require_documented(triton: str, table: str) -> None:
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    found = re.search(rf"^### Triton {re.escape(triton)}\n\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    assert found and found[1].strip() == table, f"docs/kernels.md needs under ### Triton {triton}:\n{table}"


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
    require_documented(version("triton"), compile_all(tmp_path))


def test_the_triton_of_the_device_compiles_what_is_documented(tmp_path: Path) -> None:
    aside = tmp_path / "triton"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(aside)]
    subprocess.run([*install, f"triton=={DEVICE_TRITON}"], check=True)
    require_documented(DEVICE_TRITON, compile_all(tmp_path / "cache", aside))
