"""The norms in plain torch: their definition, and the CPU path.

Legend: C width, `...` any leading dims.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layernorm of x [..., C]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def residual_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x plus the layernorm of y: [..., C]."""
    return x + layer_norm(y, weight, bias, eps)


def sandwich_norm(
    x: Tensor, y: Tensor, weight_a: Tensor, bias_a: Tensor, weight_b: Tensor, bias_b: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x plus the layernorm a of y, and the layernorm b of that: each [..., C]."""
    out = residual_norm(x, y, weight_a, bias_a, eps)
    return out, layer_norm(out, weight_b, bias_b, eps)
