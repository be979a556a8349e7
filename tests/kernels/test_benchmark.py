"""The benchmark's own checks; its times need a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*arguments: str, interpret: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch/benchmark.py"), *arguments]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": interpret}, capture_output=True, text=True)


@pytest.mark.parametrize(("name", "case"), [("kernels", "tiny window"), ("cross_entropy", "tiny trained")])
def test_the_benchmark_checks_results_first(name: str, case: str) -> None:
    done = benchmark(name, "--tiny", interpret="0" if torch.cuda.is_available() else "1")
    assert done.returncode == 0, done.stderr
    assert f"{case}: relative error" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["kernels", "cross_entropy"])
def test_the_benchmark_says_that_it_needs_a_gpu(name: str) -> None:
    done = benchmark(name, interpret="0")
    assert done.returncode == 1 and "no CUDA device" in done.stderr


def test_an_unknown_benchmark_is_refused() -> None:
    done = benchmark("nothing", interpret="0")
    assert done.returncode == 2 and "usage" in done.stderr
