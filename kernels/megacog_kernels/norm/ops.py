"""Public norms, for eager and compiled models, with gradients.

Legend: C width, `...` any leading dims; R rows, all leading dims as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megacog_kernels.dispatch import Implementation, choose
from megacog_kernels.norm import reference

MAX_WIDTH = 8192
"""Of a row that one program holds in registers."""


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, implementation: Implementation = "auto"
) -> Tensor:
    """Layernorm of x over its last dimension.

    As in all norms here: statistics are fp32, gradients are bitwise the same in every run, and those of
    weight and bias are computed only where they are needed.

    Args:
        x: [..., C]; rows that are not contiguous are copied.
        weight, bias: [C], of the dtype of x.
        eps: Added to the variance.
        implementation: `auto` runs Triton where it can; `triton` insists on it.

    Raises:
        ValueError: An argument does not fit, by name and shape, or Triton cannot run as asked.
    """
    _check(x, weight=weight, bias=bias)
    if _choose(implementation, x) == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    return torch.ops.megacog.norm(None, x, None, None, weight, bias, eps)[1]


def residual_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, implementation: Implementation = "auto"
) -> Tensor:
    """x plus the layernorm of y, in one pass over memory: see `layer_norm`.

    Args:
        x, y: [..., C], of one shape and dtype.
    """
    _check(x, y, weight=weight, bias=bias)
    if _choose(implementation, x) == "reference":
        return reference.residual_norm(x, y, weight, bias, eps)
    return torch.ops.megacog.norm(x, y, weight, bias, None, None, eps)[0]


def sandwich_norm(
    x: Tensor,
    y: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    eps: float = 1e-5,
    *,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """out = x + LN_a(y) and LN_b(out), in one pass over memory: see `layer_norm`.

    Args:
        x, y: [..., C], of one shape and dtype.
    """
    _check(x, y, weight_a=weight_a, bias_a=bias_a, weight_b=weight_b, bias_b=bias_b)
    if _choose(implementation, x) == "reference":
        return reference.sandwich_norm(x, y, weight_a, bias_a, weight_b, bias_b, eps)
    out, normed, _ = torch.ops.megacog.norm(x, y, weight_a, bias_a, weight_b, bias_b, eps)
    return out, normed
