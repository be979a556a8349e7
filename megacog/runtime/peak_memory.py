"""The most memory of a stretch of a program."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def what(device: torch.device) -> str:
    """What `peak_bytes` counts on a device."""
    return "CUDA tensors" if device.type == "cuda" else "resident memory of the process"


def start_peak(device: torch.device) -> None:
    """Begin a stretch. Where the system does not let resident memory be reset, it is the process's from its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        pass


def peak_bytes(device: torch.device) -> int:
    """The most memory since `start_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
