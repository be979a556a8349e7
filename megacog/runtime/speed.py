"""What a device reaches: its matrix products and its copies, measured where a run is to be judged by them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

GPU_MATMUL_SIZE = 8192
"""Side of the square product that peaks are quoted for here: 1.1 TFLOP, 128 MiB per bf16 matrix."""
CPU_MATMUL_SIZE = 1024
GPU_COPY_BYTES = 2 << 30
"""Beyond every cache, as the weights of a step are."""
CPU_COPY_BYTES = 128 << 20
_WARM_UPS = 3


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The median time of one call, over as many calls as fit into `seconds` (at least three), after a warm-up.

    On a GPU each call is timed on the device itself, and the host runs ahead of it.
    """
    for _ in range(_WARM_UPS):
        run()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    calls = max(3, min(1000, int(seconds / max(time.perf_counter() - start, 1e-7))))
    return statistics.median(_device_times(run, calls) if device.type == "cuda" else _host_times(run, calls))


def _host_times(run: Callable[[], Any], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def _device_times(run: Callable[[], Any], calls: int) -> list[float]:
    event: Any = partial(torch.cuda.Event, enable_timing=True)
    marks = [(event(), event()) for _ in range(calls)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def matmul_tflops(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, size: int | None = None, seconds: float = 1.0
) -> float:
    """TFLOP/s of a square matrix product of random numbers (zeros would run faster: they cost less power).

    Args:
        device: Where.
        dtype: Of the matrices; what the run computes in.
        size: Side of the matrices; None = 8192 on a GPU, 1024 on a CPU.
        seconds: To measure for, roughly.
    """
    size = size or (GPU_MATMUL_SIZE if device.type == "cuda" else CPU_MATMUL_SIZE)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b, out=out), device, seconds) / 1e12


def copy_bandwidth(device: torch.device, size: int | None = None, seconds: float = 0.5) -> float:
    """Bytes per second of a copy within the device's memory, read and written ones together.

    Args:
        device: Where.
        size: Bytes that are copied; None = 2 GiB on a GPU, 128 MiB on a CPU.
        seconds: To measure for, roughly.
    """
    size = size or (GPU_COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device, seconds)
