"""Public quantization to e4m3 and the product of quantized matrices; no gradients of their own.

Legend: R rows, C and K columns, N columns of a product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megacog_kernels.dispatch import Implementation, choose
from megacog_kernels.fp8 import reference
from megacog_kernels.fp8.calls import WIDEST, run_quantize, run_transpose

E4M3 = torch.float8_e4m3fn


def quantize_rows(
    x_RC: Tensor, columns_C: Tensor | None = None, *, implementation: Implementation = "auto"
) -> tuple[Tensor, Tensor]:
    """Every row in e4m3 with a scale of its own: x * columns = codes * scale to e4m3's 4 bits of mantissa.

    Scales are powers of two, so mantissas are rounded as they are: wherever a row is cut, and whatever else is in
    it, an element gets the same value, except for the smallest (less than 2^-14 of the row's largest), which lose
    bits. A row that is not finite gives NaN.

    Args:
        x_RC: [R, C].
        columns_C: fp32 [C], factors of the columns; None = 1.
        implementation: `auto` runs Triton where it can; `triton` insists on it.

    Returns:
        float8_e4m3fn [R, C], fp32 [R, 1].
    """
    if x_RC.dim() != 2:
        raise ValueError(f"x has shape {tuple(x_RC.shape)}, rows and columns are needed")
    if columns_C is not None and columns_C.shape != x_RC.shape[1:]:
        raise ValueError(f"columns has shape {tuple(columns_C.shape)}, x {tuple(x_RC.shape)}")
    width = x_RC.shape[1]
    unfit = f"rows of {width} are longer than {WIDEST}" if width > WIDEST else None
    chosen = choose("quantize_rows", implementation, x_RC.device, x_RC.dtype, f"width {width}", unfit)
    codes_RC, scale_R1 = torch.ops.megacog.quantize_rows(x_RC.contiguous(), columns_C, chosen == "triton")
    return codes_RC, scale_R1


def transposed(codes: Tensor, *, implementation: Implementation = "auto") -> Tensor:
    """The transpose of a contiguous e4m3 matrix, contiguous."""
    chosen = choose("transposed", implementation, codes.device, torch.bfloat16, "one byte")
    turned: Tensor = torch.ops.megacog.transposed_bytes(codes, chosen == "triton")
    return turned


@torch.library.custom_op("megacog::quantize_rows", mutates_args=())
def _quantize_rows(x_RC: Tensor, columns_C: Tensor | None, triton: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of contiguous rows. One operator either way, so that whoever traces a model sees its result."""
    return (run_quantize if triton else reference.quantize_rows)(x_RC, columns_C)


@_quantize_rows.register_fake
def _(x_RC: Tensor, columns_C: Tensor | None, triton: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_RC, dtype=E4M3), x_RC.new_empty(len(x_RC), 1, dtype=torch.float32)


@torch.library.custom_op("megacog::transposed_bytes", mutates_args=())
def _transposed(codes: Tensor, triton: bool) -> Tensor:
    return (run_transpose if triton else reference.transposed)(codes)


@_transposed.register_fake
def _(codes: Tensor, triton: bool) -> Tensor:
    return codes.new_empty(codes.shape[1], codes.shape[0])


def fp8_product(
    a_RK: Tensor, scale_R1: Tensor, b_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None, *, fast: bool = True
) -> Tensor:
    """(scale * a) @ (scale * b)^T + bias in bf16, [R, N]: torch's scaled matrix product.

    Both operands are e4m3 and contiguous over what is summed, the one layout of Hopper's tensor cores. K and N are
    multiples of 16.

    Args:
        a_RK, b_NK: float8_e4m3fn.
        scale_R1, scale_N: fp32, of the rows.
        bias_N: bf16.
        fast: Let tensor cores add up in fewer bits than fp32 (Hopper; elsewhere it means nothing).
    """
    row_wise = F.ScalingType.RowWise
    return F.scaled_mm(
        a_RK, b_NK.t(), scale_R1, row_wise, scale_N[None, :], row_wise,
        bias=bias_N, output_dtype=torch.bfloat16, use_fast_accum=fast,
    )  # fmt: skip
