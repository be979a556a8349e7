"""All kernels compiled for three architectures without a GPU, against the tables of docs/kernels.md."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "kernels/benchmarks/compile_kernels.py"
OLDEST = "3.6.0"
"""Of the Tritons that setup.py allows; the newest is installed."""


@pytest.fixture(scope="session")
def oldest(pytestconfig: pytest.Config) -> Path:
    """The oldest Triton, installed aside."""
    folder = pytestconfig.cache.mkdir(f"triton-{OLDEST}")
    if not (folder / "triton/__init__.py").is_file():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, f"triton=={OLDEST}"], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", ["installed", OLDEST])
def test_kernels_compile_to_what_is_documented(version: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    aside = [] if version == "installed" else [request.getfixturevalue("oldest")]
    path = os.pathsep.join(map(str, [*aside, ROOT, ROOT / "kernels"]))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, TOOL, "--check", ROOT / "docs/kernels.md", "--share", "8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_table_of_other_kernels_or_figures_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("compile_kernels", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compile_kernels", tool)  # dataclasses look their module up
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "fingerprint", lambda: "abc")
    rows = [
        tool.Figures("forward, full, rows, d64", arch, dtype, "64x64 ", 4, 2, registers, 0, 4096, True, 8)
        for arch, dtype, registers in ((80, "bf16", 90), (80, "fp16", 90), (90, "bf16", 91), (90, "fp16", 92))
    ]
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n## After\n", encoding="utf-8")
    tool.write(page, rows)
    good = page.read_text(encoding="utf-8")
    assert "| forward, full, rows, d64 | 64x64 w4 x2: 90, 4 K | bf16 64x64 w4 x2: 91, 4 K; fp16 64" in good
    tool.write(page, rows)
    assert page.read_text(encoding="utf-8") == good
    assert tool.differences(page, rows) == []
    for row in rows:
        other = dataclasses.replace(row, registers=80)
        assert "w4 x2: 80, 4 K" in tool.differences(page, [other])[0]
    monkeypatch.setattr(tool, "fingerprint", lambda: "abd")
    assert "the kernels have changed" in tool.differences(page, rows)[0]
    bad = dataclasses.replace(rows[2], stack=8, wgmma=0, registers=256, resident=3, shared=2**17)
    found = " ".join(tool.faults(bad))
    for fault in ("spills (8 bytes of stack)", "no wgmma", "256 registers for less than 3", "131072 bytes shared for"):
        assert fault in found
