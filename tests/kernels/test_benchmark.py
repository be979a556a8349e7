"""The benchmark's own checks; its times need a GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import DEVICE

from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid, dense_mask

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*arguments: str, interpret: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch/benchmark.py"), *arguments]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": interpret}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "case"),
    [("kernels", "tiny window"), ("fused", "sandwich norm, trained"), ("cross_entropy", "tiny trained"),
     ("fp8_products", "tiny, backward, exact")],  # fmt: skip
)
def test_the_benchmark_checks_results_first(name: str, case: str) -> None:
    done = benchmark(name, "--tiny", interpret="0" if torch.cuda.is_available() else "1")
    assert done.returncode == 0, done.stderr
    assert f"{case}: relative error" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["kernels", "fused", "cross_entropy", "fp8_products"])
def test_the_benchmark_says_that_it_needs_a_gpu(name: str) -> None:
    done = benchmark(name, interpret="0")
    assert done.returncode == 1 and "no CUDA device" in done.stderr


@pytest.fixture
def attention_benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "kernels/benchmarks")
    for name in ("cases", "attention"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("attention")


def test_flex_attention_gets_the_same_mask_in_any_order_of_tokens(attention_benchmark: Any) -> None:
    grid, L = VideoGrid(3, 3, 4), 2
    order = torch.from_numpy(np.random.default_rng(0).permutation(grid.tokens))
    slot = torch.arange(L + grid.tokens)
    for space in (Space(), Space("frame"), Space("local3d", (3, 3), 2), Space("shifted_window", (2, 2), shift=(1, 1))):
        mask = MaskSpec(Order.interpolation(3), space)
        case = attention_benchmark.Case("", mask, grid, 1, 1, text=L)
        got = attention_benchmark.flex_rule(case, order)(None, None, slot[:, None], slot[None])
        assert got[:, :L].all() and not got[:L, L:].any()
        assert torch.equal(got[L:, L:], torch.from_numpy(dense_mask(mask, grid).copy())[order][:, order])


def test_goals_are_judged_by_the_measured_ratios(attention_benchmark: Any) -> None:
    def row(case: str, name: str, forward: float, both: float, **more: float) -> dict:
        return {"case": case, "implementation": name, "forward_ms": forward, "forward_backward_ms": both} | more

    rows = [
        row("sequential full", "cudnn", 1.0, 3.0), row("sequential full", "megacog", 1.05, 5.0, extra_memory=0.01),
        row("sequential full", "megacog, fast", 1.05, 4.05),
        row("base, own frame", "cudnn", 1.0, 3.0), row("base, own frame", "megacog", 0.4, 1.6, extra_memory=0.06),
        row("base, own frame", "megacog, fast", 0.4, 1.6),
        {"case": "base, own frame", "implementation": "flex", "failed": "no"},
    ]  # fmt: skip
    lines = attention_benchmark.goals(rows, 800.0)
    verdicts = {line.split("  ")[0].strip(): line.split()[-1] for line in lines}
    assert verdicts == {
        "sequential full: forward / cuDNN": "reached",
        "sequential full: backward / cuDNN": "MISSED",
        "sequential full: fast backward / cuDNN": "MISSED",
        "base, own frame: cuDNN / ours": "MISSED",
        "deterministic / fast backward, worst": "reached",
        "extra memory, worst": "MISSED",
    }


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("broken", ["fast q", "frame_k", "text_v"])
def test_a_wrong_gradient_ends_the_benchmark_before_it_times(
    attention_benchmark: Any, monkeypatch: pytest.MonkeyPatch, broken: str, sampled: bool
) -> None:
    from megacog_kernels.attention import calls

    cases = importlib.import_module("cases")
    monkeypatch.setattr(cases, "SAMPLED_ABOVE", 20 if sampled else 2500)
    case = cases.tiny()[0]
    tensors = cases.Tensors.make(case, DEVICE, torch.float32)
    assert cases.check(case, tensors) < 1e-5
    right = calls.run_backward

    def wrong(*arguments: Any) -> Any:
        got = right(*arguments)
        if broken != "fast q" or not arguments[-1]:
            getattr(got, broken.split()[-1]).zero_()
        return got

    monkeypatch.setattr(calls, "run_backward", wrong)
    with pytest.raises(SystemExit, match="tiny window: relative error"):
        cases.check(case, tensors)


def test_an_unknown_benchmark_is_refused() -> None:
    done = benchmark("nothing", interpret="0")
    assert done.returncode == 2 and "usage" in done.stderr
