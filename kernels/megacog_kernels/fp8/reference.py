"""Quantization to e4m3 in plain torch: its definition, and the CPU path.

Legend: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_EXPONENT = 8
"""The largest e4m3 number is 448 = 1.75 * 2^8."""
E4M3_MANTISSA = 0x600000
"""Mantissa bits of 1.75 in fp32."""


def power_of_two_scale(amax: Tensor) -> Tensor:
    """The least power of two 2^k with amax / 2^k <= 448, of fp32 magnitudes; NaN where amax is not finite."""
    bits = amax.view(torch.int32)
    exponent = (bits >> 23) - E4M3_EXPONENT + ((bits & 0x7FFFFF) > E4M3_MANTISSA).int()
    scale = (exponent.clamp(min=1) << 23).view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)


def quantize_rows(x_RC: Tensor, columns_C: Tensor | None) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [R, C] and fp32 scales [R, 1]; see `ops.quantize_rows`."""
    value_RC = x_RC.float() if columns_C is None else x_RC.float() * columns_C
    amax_R1 = value_RC.abs().amax(1, keepdim=True) if value_RC.numel() else value_RC.new_zeros(len(x_RC), 1)
    scale_R1 = power_of_two_scale(amax_R1)
    return (value_RC / scale_R1).to(torch.float8_e4m3fn), scale_R1


def transposed(codes: Tensor) -> Tensor:
    """[C, R] in memory of its own."""
    return codes.t().clone(memory_format=torch.contiguous_format)
