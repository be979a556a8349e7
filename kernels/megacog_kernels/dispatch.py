"""Which implementation of an op runs, and why: said once per reason, never silently.

`auto` takes Triton on CUDA devices that it can serve and the reference elsewhere. Asking for
`triton` where it cannot run is an error.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal

import torch

Implementation = Literal["auto", "reference", "triton"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_log = logging.getLogger("megacog_kernels")
_planned: ContextVar[bool] = ContextVar("planned", default=False)


@torch.compiler.assume_constant_result  # torch.compile asks while it traces
def choose(
    op: str, implementation: str, device: torch.device, dtype: torch.dtype, size: str, unfit: str | None = None
) -> str:
    """`triton` or `reference`.

    Args:
        op: Its name, for the log.
        implementation: What the caller asks for.
        device, dtype: Of the op's tensors.
        size: The size that the kernels depend on, for the log, such as `head dim 64`.
        unfit: Why the op's kernels cannot take that size, if so.

    Raises:
        ValueError: Triton is asked for and cannot run, or the name is unknown.
    """
    interpreted, planned = os.environ.get("TRITON_INTERPRET") == "1", _planned.get()
    chosen, reason = _choose(implementation, device, dtype, unfit, interpreted or fake_tensors(), planned)
    if not planned:
        _say(f"{op} on {device.type} ({str(dtype).removeprefix('torch.')}, {size}): {chosen}, {reason}")
    return chosen


@contextmanager
def planned_for_gpu() -> Iterator[None]:
    """Fake tensors stand for those of a GPU that Triton serves: `auto` takes what it would take there.

    No kernel runs, so neither the GPU nor Triton need be here.
    """
    token = _planned.set(True)
    try:
        yield
    finally:
        _planned.reset(token)


def serves(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device."""
    return _obstacle(device, torch.bfloat16, None, False, False) is None


def fake_tensors() -> bool:
    """Whether tensors are fake now (`torch._subclasses`): operators give shapes and no kernel runs."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


@cache
def _choose(
    implementation: str, device: torch.device, dtype: torch.dtype, unfit: str | None, interpreted: bool, planned: bool
) -> tuple[str, str]:
    if implementation not in ("auto", "reference", "triton"):
        raise ValueError(f"implementation {implementation!r} is none of auto, reference, triton")
    if implementation == "reference":
        return "reference", "as asked"
    obstacle = _obstacle(device, dtype, unfit, interpreted, planned)
    if implementation == "triton":
        if obstacle:
            raise ValueError(f"implementation 'triton' cannot run: {obstacle}")
        return "triton", "as asked"
    if obstacle:
        return "reference", f"because {obstacle}"
    if planned:
        return "triton", "planned"
    if device.type == "cpu":
        return "reference", "because Triton only interprets kernels on CPUs"
    return "triton", f"on {torch.cuda.get_device_name(device)}"


def _obstacle(
    device: torch.device, dtype: torch.dtype, unfit: str | None, interpreted: bool, planned: bool
) -> str | None:
    """Why Triton cannot run, if so."""
    if not planned and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if unfit:
        return unfit
    if dtype not in DTYPES:
        return f"the kernels do not know {dtype}"
    if planned:
        return None
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"the device has compute capability {major}.{minor}, 8.0 is needed"
    if device.type == "cpu" and interpreted:
        return None
    return f"the tensors are on a device of type {device.type}"


@cache
def _say(line: str) -> None:
    _log.info(line)
