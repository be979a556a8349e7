"""Frozen matrices in e4m3: one byte per element, and products on the tensor cores' fp8 path in both directions.

A matrix W [N, K] is held as codes and a power-of-two scale s per output feature n, made once from the stored weights.
Activations are quantized row by row as they come. With x and grad in e4m3 too:

    y  = x @ (s * codes)^T + bias
    dx = (grad * s) @ codes

so that one copy serves both: in dx the features n are summed over, and their scales go into the gradient before it is
quantized. Both operands of a product lie contiguous over what is summed, as Hopper's tensor cores want them, which
turns the codes over for dx, in every backward pass: 2 bytes of traffic per element instead of one more of memory.

All scales are powers of two: they shift exponents and leave mantissas alone, so that a matrix or an activation that
is cut over tensor-parallel ranks has the values of the whole one. e4m3 for gradients too: a scale per row gives their
range, which is what e5m2 would spend a bit of mantissa on.

Codes and scales are held as integers: what casts a module's floating-point tensors to another dtype (DeepSpeed casts
all of them to bf16) must pass them by.

Shapes: R rows, K features in, N features out, `...` any leading dims.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megacog.errors import EnvError
from megacog_kernels.fp8 import fp8_product, quantize_rows, transposed
from megacog_kernels.products import linear, multiply

SIDE = 16
"""Both sides of a matrix are multiples of this: torch.nn.functional.scaled_mm."""
_CAPABILITY = (8, 9)


def why_not(device: torch.device) -> str | None:
    """Why the device multiplies no e4m3 matrices; None if it does."""
    if device.type == "cpu" or device.type == "meta":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device.type} is none of NVIDIA's here"
    found = torch.cuda.get_device_capability(device)
    return None if found >= _CAPABILITY else f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"


def check_device(device: torch.device) -> None:
    """Raises:
    EnvError: The device multiplies no e4m3 matrices; nothing else is used instead.
    """
    reason = why_not(device)
    if reason is not None:
        raise EnvError(
            f"base_precision fp8 needs compute capability 8.9 (NVIDIA's Ada, Hopper or later); {reason}; set it to null"
        )


def hold_in_fp8(modules: Iterable[nn.Module]) -> None:
    """Let every parallel linear layer in `modules` hold its frozen weight in e4m3 from now on, uninitialized.

    Names, shapes and shards of parameters stay; `load_weight` fills them. To be called while they are on the
    meta device, so that the weights never exist in another precision.
    """
    for module in modules:
        for layer in module.modules():
            if hasattr(layer, "weight_scale"):
                _hold(layer)


def _hold(layer: nn.Module) -> None:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    if weight.requires_grad:
        raise ValueError("a trained weight cannot be held in e4m3")
    if any(side % SIDE for side in weight.shape):
        raise ValueError(f"a matrix {tuple(weight.shape)} cannot be held in e4m3: sides are no multiples of {SIDE}")
    codes = nn.Parameter(torch.empty_like(weight, dtype=torch.uint8), requires_grad=False)
    vars(codes).update(vars(weight))
    layer.weight = codes
    layer.weight_scale = torch.empty(len(weight), dtype=torch.int32, device=weight.device)


@torch.no_grad()
def load_weight(layer: nn.Module, weight: Tensor) -> None:
    """Quantize this rank's part of a weight [N, K], of any dtype and device, into a layer that holds it in e4m3."""
    assert isinstance(layer.weight, Tensor) and isinstance(layer.weight_scale, Tensor)
    codes, scale = as_held(weight.to(layer.weight.device))
    layer.weight.copy_(codes)
    layer.weight_scale.copy_(scale)


def as_held(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer holds of a weight [N, K]: codes uint8 [N, K] and the bits of their scales, int32 [N]."""
    codes, scale = quantize_rows(weight)
    return codes.view(torch.uint8), scale.flatten().view(torch.int32)


def held_weight(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """What a held weight stands for: fp32 [N, K]."""
    return weight.view(torch.float8_e4m3fn).float() * weight_scale.view(torch.float32)[:, None]


def weight_product(x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias: [..., K] -> [..., N]. A weight with a scale is held in e4m3, and x is bf16 then."""
    if weight_scale is None:
        return linear(x, weight, bias)
    if x.dtype != torch.bfloat16:
        raise ValueError(f"a product with a weight in e4m3 takes and gives bfloat16, not {x.dtype}")
    codes_RK, scale_R1 = quantize_rows(x.flatten(0, -2))
    held = (weight.view(torch.float8_e4m3fn), weight_scale.view(torch.float32))
    return fp8_product(codes_RK, scale_R1, *held, bias).view(*x.shape[:-1], len(weight))


def input_gradient(grad: Tensor, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    """Gradient [..., K] of `weight_product`'s x, from that of its output [..., N]."""
    if weight_scale is None:
        return multiply(grad, weight)
    scale_N, rows = weight_scale.view(torch.float32), grad.flatten(0, -2)
    codes_RN, scale_R1 = quantize_rows(rows, scale_N)
    turned_KN = transposed(weight.view(torch.float8_e4m3fn))
    dx = fp8_product(codes_RN, scale_R1, turned_KN, scale_N.new_ones(len(turned_KN)), fast=False)
    return dx.view(*grad.shape[:-1], len(turned_KN))
