"""Parity at the released model's width: 3072 channels, 48 heads, 150010 words, two layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_GIB = 20.0
"""What one command may need."""
FREE_GIB = 10.0
"""What must be free, so that no process is killed for want of memory; docs/benchmarks.md has what was measured."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_our_model_agrees_with_the_plain_one_at_full_width_within_20_gib(repository: Path, tmp_path: Path) -> None:
    free = available_gib()
    assert free >= FREE_GIB, f"{free:.1f} GiB of memory are free, this test needs {FREE_GIB:g}: run it alone"
    path = tmp_path / "full.safetensors"
    made = convert(
        repository, "parity-file", "--config", "configs/cogvideo-9b.yaml", "--set", "model.num_layers=2",
        "--stage", "interpolation", "--padding", "17", "--out", path,
    )  # fmt: skip
    assert float(made.split("peak memory ")[1].split()[0]) < MOST_GIB
    report = json.loads(convert(repository, "parity", path, "--json"))
    path.unlink()
    assert report["passed"] and len(report["tensors"]) == 6
    assert report["peak_memory_gib"] < MOST_GIB
    assert report["tensors"]["out.image_loss"]["relative"] <= 1e-5
    assert all(row["relative"] <= 1e-4 for row in report["tensors"].values())


def convert(repository: Path, *arguments: object) -> str:
    """What the command prints."""
    command = [sys.executable, "launch/convert.py", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    return subprocess.run(
        command, cwd=repository, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def available_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:"))
