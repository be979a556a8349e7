from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from megacog.runtime.speed import copy_bandwidth, matmul_tflops, median_seconds

CPU = torch.device("cpu")


def test_the_median_ignores_a_slow_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, clock = 0, 0.0
    monkeypatch.setattr("megacog.runtime.speed.time", SimpleNamespace(perf_counter=lambda: clock))

    def run() -> None:
        nonlocal calls, clock
        calls += 1
        clock += 0.2 if calls == 6 else 0.005  # 3 warm-ups, one to count with, then the timed ones

    assert median_seconds(run, CPU, 0.052) == pytest.approx(0.005)
    assert calls == 3 + 1 + 10


def test_a_call_longer_than_the_budget_is_still_measured_three_times() -> None:
    calls = []
    assert median_seconds(lambda: calls.append(time.sleep(0.01)), CPU, 0.0) >= 0.01
    assert len(calls) == 3 + 1 + 3


def test_a_matmul_counts_two_operations_per_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def one_second(run: object, device: torch.device, seconds: float) -> float:
        seen.append(run())  # type: ignore[operator]
        return 1.0

    monkeypatch.setattr("megacog.runtime.speed.median_seconds", one_second)
    assert matmul_tflops(CPU, torch.float32, size=100) == pytest.approx(2e6 / 1e12)
    assert seen[0].shape == (100, 100) and seen[0].dtype == torch.float32
    assert copy_bandwidth(CPU, size=1000) == 2000.0
    assert seen[1].count_nonzero() == 1000


def test_this_machine_multiplies_and_copies() -> None:
    assert 1e-4 < matmul_tflops(CPU, torch.float32, size=256, seconds=0.02) < 1e3
    assert 1e7 < copy_bandwidth(CPU, size=4 << 20, seconds=0.02) < 1e13
