"""Facts about the device under this process."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from typing import TYPE_CHECKING, Any

from megacog.errors import EnvError
from megacog.runtime.ranks import Ranks, gpu_index

if TYPE_CHECKING:
    import torch

# Dense peak of one device in TFLOP/s: (name pattern, bf16 on tensor cores, fp32 without TF32), from the
# vendors' data sheets. First match wins. A device that is not here has no MFU: a guess would be worse.
_PEAKS: tuple[tuple[str, float | None, float | None], ...] = (
    (r"\bGB200\b", 2500.0, 80.0),
    (r"\bB200\b", 2250.0, 75.0),
    (r"\bH200 NVL\b", 835.5, 60.0),
    (r"\bH200\b", 989.4, 66.9),
    (r"\bGH200\b", 989.4, 66.9),
    (r"\bH[18]00 NVL\b", 835.5, 60.0),
    (r"\bH[18]00 PCIe\b", 756.0, 51.2),
    (r"\bH[18]00\b", 989.4, 66.9),
    (r"\bH20\b", 148.0, 44.0),
    (r"\bA[18]00\b", 312.0, 19.5),
    (r"\bA40\b", 149.7, 37.4),
    (r"\bA30\b", 165.0, 10.3),
    (r"\bA10G\b", 70.0, 31.5),
    (r"\bA10\b", 125.0, 31.2),
    (r"\bRTX A6000\b", 154.8, 38.7),
    (r"\bL40S\b", 362.0, 91.6),
    (r"\bL40\b", 181.0, 90.5),
    (r"\bL4\b", 121.0, 30.3),
    (r"\bRTX 6000 Ada\b", 364.2, 91.1),
    (r"\bRTX 4090\b", 165.2, 82.6),
    (r"\bRTX 3090\b", 71.0, 35.6),
    (r"\bV100-SXM\d?", None, 15.7),
    (r"\bV100\b", None, 14.0),
    (r"\bMI300X\b", 1307.4, 163.4),
    (r"\bMI250X\b", 191.5, 23.9),  # one of the two dies, which is one device to the software
)


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Return the dense peak of a device in TFLOP/s, or None when it is not known (CPUs, new GPUs).

    Args:
        device_name: as `device_name()` returns it.
        precision: "bf16" (tensor cores) or "fp32" (no TF32).
    """
    column = {"bf16": 1, "fp32": 2}.get(precision)
    if column is None:
        raise ValueError(f"precision must be 'bf16' or 'fp32', not {precision!r}")
    for row in _PEAKS:
        if re.search(row[0], device_name):
            return row[1] if column == 1 else row[2]
    return None


def memory_gib() -> float:
    """Return the peak memory of this process in GiB: CUDA tensors on a GPU, else resident memory."""
    torch = _loaded_torch()
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    units = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units / 2**30


def device_name() -> str:
    """Return the name of the current GPU, or of the CPU when there is none."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return _cpu_name()


def describe_device() -> str:
    """Return one line for the head of a run: device, its memory or cores, and the torch version."""
    import torch

    if torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        what = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} ({gib:.0f} GiB)"
    else:
        what = f"CPU {_cpu_name()} ({available_cores()} cores)"
    return f"{what}, torch {torch.__version__}"


def usable_device(name: str) -> str:
    """Return `name` (cpu, cuda, cuda:1, ...) after checking that torch can compute there.

    Raises:
        EnvError: it is no device, or this machine or this torch lacks it.
    """
    import torch

    try:
        torch.empty(1, device=name).add_(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise EnvError(
            f"--device {name} cannot be used: {reason.rstrip('.')}. Devices here: {', '.join(['cpu', *found])}."
        ) from error
    return name


def rank_device(ranks: Ranks) -> torch.device:
    """Make this rank's GPU the current device and return it; without GPUs, the CPU.

    Raises:
        EnvError: there are fewer GPUs than ranks on this machine.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", gpu_index(ranks, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def available_cores() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _loaded_torch() -> Any:
    """Return torch if this process uses it already: measuring memory must not add 300 MB to it."""
    return sys.modules.get("torch")
