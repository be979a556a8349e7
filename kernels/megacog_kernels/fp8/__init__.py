"""Rows in e4m3 and the matrix product of two such matrices: what frozen weights are multiplied with."""

from megacog_kernels.fp8.ops import fp8_product as fp8_product
from megacog_kernels.fp8.ops import quantize_rows as quantize_rows
from megacog_kernels.fp8.ops import transposed as transposed
