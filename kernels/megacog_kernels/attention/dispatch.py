"""Which implementation of attention runs (see `megacog_kernels.dispatch`)."""

from __future__ import annotations

import torch

from megacog_kernels import dispatch
from megacog_kernels.dispatch import Implementation

HEAD_DIMS = (16, 32, 64, 128)


def choose(implementation: Implementation, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """`triton` or `reference`.

    Raises:
        ValueError: Triton is asked for and cannot run, or the name is unknown.
    """
    unfit = None
    if head_dim not in HEAD_DIMS:
        unfit = f"the kernels know head dims {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return dispatch.choose("attention", implementation, device, dtype, f"head dim {head_dim}", unfit)
