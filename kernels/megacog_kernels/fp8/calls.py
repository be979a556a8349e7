"""Arguments of the quantization kernels: to run them, or to compile them ahead of time.

Legend: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megacog_kernels.launch import Call, Warps

TILE = 64
"""Side of a tile that is turned over: 64 bytes are two sectors of memory on either side."""
WIDEST = 16384
"""Columns of a row that one program holds in registers: 64 per thread of 8 warps."""


def quantize_call(x_RC: Tensor, columns_C: Tensor | None, codes_RC: Tensor, scale_R1: Tensor) -> Call:
    """Fills codes and scales."""
    from megacog_kernels.fp8.kernels import quantize_row

    R, C = x_RC.shape
    block = 1 << (C - 1).bit_length()
    columns = scale_R1 if columns_C is None else columns_C  # never touched, but an argument has to be something
    arguments = {"x": x_RC, "columns": columns, "codes": codes_RC, "scales": scale_R1}
    constants = {"WIDTH": C, "BLOCK": block, "SCALED": columns_C is not None}
    return Call(quantize_row, arguments, constants, R, Warps(4, 4) if block <= 4096 else Warps(8, 2))


def transpose_call(source: Tensor, target: Tensor) -> Call:
    """Fills target [C, R] from source [R, C], both uint8."""
    from megacog_kernels.fp8.kernels import transpose

    R, C = source.shape
    column_tiles = -(-C // TILE)
    sizes = {"rows": R, "columns": C, "column_tiles": column_tiles}
    arguments = {"source": source, "target": target} | sizes
    return Call(transpose, arguments, {"TILE": TILE}, -(-R // TILE) * column_tiles, Warps(4, 4))


def run_quantize(x_RC: Tensor, columns_C: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [R, C] and scales fp32 [R, 1]."""
    codes_RC = torch.empty_like(x_RC, dtype=torch.float8_e4m3fn)
    scale_R1 = x_RC.new_empty(len(x_RC), 1, dtype=torch.float32)
    quantize_call(x_RC, columns_C, codes_RC, scale_R1).run()
    return codes_RC, scale_R1


def run_transpose(source: Tensor) -> Tensor:
    """The transpose of a matrix of one-byte elements, contiguous."""
    target = source.new_empty(source.shape[1], source.shape[0])
    transpose_call(source.view(torch.uint8), target.view(torch.uint8)).run()
    return target


def variants(dtype: torch.dtype, capability: int, width: int = 3072) -> Iterator[tuple[str, Call]]:
    """Every kernel that training launches, by name, on tensors without storage; none before sm_89."""
    if capability < 9:
        return
    for columns in (width, 4 * width):
        rows = torch.empty(4096, columns, dtype=dtype, device="meta")
        codes = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
        scales, weights = torch.empty(4096, 1, device="meta"), torch.empty(columns, device="meta")
        yield f"e4m3 rows of {columns}", quantize_call(rows, None, codes, scales)
        yield f"e4m3 rows of {columns}, scaled", quantize_call(rows, weights, codes, scales)
    matrix = torch.empty(3 * width, width, dtype=torch.uint8, device="meta")
    yield "e4m3 transpose", transpose_call(matrix, matrix.t())
