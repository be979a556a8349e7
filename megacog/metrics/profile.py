"""Where the time of a training step goes: matrix products, attention, head, optimizer, and all the rest."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megacog.runtime.speed import synchronize

Kind = Literal["gemm", "attention", "pointwise", "head", "optimizer"]
KINDS: tuple[Kind, ...] = ("gemm", "attention", "pointwise", "head", "optimizer")
_OPTIMIZER = "megacog::optimizer"
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::_scaled_mm", "aten::_scaled_mm_v2")
"""What linear layers end in; batched products are attention's."""


def optimizer_range() -> AbstractContextManager[Any]:
    """Within it, time counts as the optimizer's."""
    return record_function(_OPTIMIZER)


@dataclass(frozen=True)
class StepProfile:
    """One profiled step."""

    seconds: Mapping[Kind, float]
    """Time on the device: of kernels on a GPU, of operators on a CPU."""
    unknown: float
    """Seconds of kernels that the profiler could not tie to an operator."""
    wall: float
    """Seconds of the step, slowed by the profiler."""
    largest: tuple[tuple[str, float], ...]
    """Kernels or operators with the most seconds."""

    @property
    def shares(self) -> dict[str, float]:
        """Share of the device's time by kind, and of the unknown."""
        total = sum(self.seconds.values()) + self.unknown
        found = {kind: self.seconds[kind] / total for kind in KINDS}
        return found | {"unknown": self.unknown / total}


def profile_step(step: Callable[[], Any], device: torch.device, largest: int = 12) -> StepProfile:
    """Profile one call; run it before, so that nothing is compiled or allocated within.

    Args:
        step: Forward, backward and, within `optimizer_range`, the update.
        device: Where it computes.
        largest: How many kernels to name.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    synchronize(device)
    start = time.perf_counter()
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        synchronize(device)
        wall = time.perf_counter() - start
    seconds: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    by_name: defaultdict[str, float] = defaultdict(float)
    for name, operators, spent in _kernels(profiler) if gpu else _operators(profiler):
        seconds[kind_of(operators)] += spent
        by_name[name] += spent
    known = sum(seconds.values())
    total = _kernel_seconds(profiler) if gpu else known
    ranked = sorted(by_name.items(), key=lambda item: item[1], reverse=True)
    return StepProfile(seconds, max(0.0, total - known), wall, tuple(ranked[:largest]))


def kind_of(operators: tuple[str, ...]) -> Kind:
    """What an operator or kernel belongs to.

    Args:
        operators: Names of the operators that it runs in, the innermost first.
    """
    if _OPTIMIZER in operators:
        return "optimizer"
    if any("linear_logsumexp" in name for name in operators):
        return "head"
    for name in operators:
        if "attend" in name or "ttention" in name:
            return "attention"
        if name in _PRODUCTS:
            return "gemm"
    return "pointwise"


def _operators(profiler: Any) -> Iterator[tuple[str, tuple[str, ...], float]]:
    for event in profiler.events():
        yield event.name, _chain(event), event.self_cpu_time_total / 1e6


def _kernels(profiler: Any) -> Iterator[tuple[str, tuple[str, ...], float]]:
    for event in profiler.events():
        if event.kernels:
            operators = _chain(event)
            for kernel in event.kernels:
                yield kernel.name, operators, kernel.duration / 1e6


def _kernel_seconds(profiler: Any) -> float:
    """Of all kernels and copies on the GPU, whoever started them."""
    events = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return float(sum(event.time_range.elapsed_us() for event in events if not event.is_user_annotation)) / 1e6


def _chain(event: Any) -> tuple[str, ...]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return tuple(names)
