"""How fast this process's device is, and whether it keeps up with the others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megacog.doctor.check import Check
from megacog.runtime.hardware import device_name, peak_tflops
from megacog.runtime.speed import copy_bandwidth, matmul_tflops

LOW_SHARE, SICK_SHARE = 0.65, 0.4
"""Of the data sheet's peak; healthy cards reach 0.75 to 0.9 of it in a large product."""
LAGGING_SHARE = 0.85
"""Of the median of all devices: one slow device holds up every step of all."""


@dataclass(frozen=True)
class DeviceSpeed:
    """What one device reached."""

    name: str
    matmul_tflops: float
    copy_bytes_per_second: float


def measure_device(device: torch.device) -> DeviceSpeed:
    """A bf16 product on a GPU or one in fp32 on a CPU, and a copy."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return DeviceSpeed(device_name(), matmul_tflops(device, dtype), copy_bandwidth(device))


def device_checks(speed: DeviceSpeed, label: str) -> list[Check]:
    """Matmul against the data sheet where that is known, and the copy rate.

    Args:
        speed: As measured.
        label: Which device, such as "GPU 3".
    """
    peak = peak_tflops(speed.name, "bf16")
    name, value = f"matmul, {label}", f"{speed.matmul_tflops:.3g} TFLOP/s"
    copy = Check(f"copy, {label}", "ok", f"{speed.copy_bytes_per_second / 1e9:.0f} GB/s")
    if peak is None:
        return [Check(name, "ok", f"{value}; peak of {speed.name} unknown"), copy]
    share = speed.matmul_tflops / peak
    value = f"{value}, {share:.0%} of the data sheet's {peak:.0f}"
    if share >= LOW_SHARE:
        return [Check(name, "ok", value), copy]
    fix = "another process, a power cap or heat: see nvidia-smi -q -d PERFORMANCE,POWER"
    return [Check(name, "sick" if share < SICK_SHARE else "warning", value, fix), copy]


def lagging_checks(speeds: Mapping[int, DeviceSpeed]) -> dict[int, Check]:
    """By rank, the devices that multiply slower than those of the other ranks."""
    median = statistics.median(speed.matmul_tflops for speed in speeds.values())
    found = {}
    for rank, speed in speeds.items():
        share = speed.matmul_tflops / median
        if share < LAGGING_SHARE:
            value = f"{speed.matmul_tflops:.3g} TFLOP/s, {share:.0%} of the median of {len(speeds)} ranks"
            fix = "leave this node out, and look at heat, power cap and clocks of its device"
            found[rank] = Check(f"matmul, rank {rank}", "sick", value, fix)
    return found
