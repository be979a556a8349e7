"""Arguments of the norm kernels: to run them, or to compile them ahead of time.

Legend: R rows, C width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megacog_kernels.launch import Call, Warps

MAX_WIDTH = 8192
"""Of a row that one program holds in registers."""
ROWS_SUMMED = 64
"""Rows whose gradients of weights one program adds up. The same on every device, so that the order of the
sum is too; written and read, the sums of sandwich_norm are 2 * 4 * 4 / (64 * 12) = 4 % of what it moves in bf16."""


@dataclass(frozen=True)
class Inputs:
    """out = x + LN_a(y) if there is a norm a, else y itself; normed = LN_b(out) if there is a norm b.

    All contiguous. x and the biases matter to the forward pass only.
    """

    y: Tensor
    """[R, C]."""
    weight_a: Tensor | None
    """[C], as all weights and biases."""
    weight_b: Tensor | None
    x: Tensor | None = None
    """[R, C]."""
    bias_a: Tensor | None = None
    bias_b: Tensor | None = None

    @property
    def norms(self) -> int:
        return (self.weight_a is not None) + (self.weight_b is not None)


@dataclass(frozen=True)
class Needed:
    """Which gradients a backward pass has to make."""

    x: bool
    """By the kernel. Without norm b it is that of out, which nobody has to copy."""
    y: bool
    a: bool
    """Of the weight and bias of norm a."""
    b: bool

    @property
    def sums(self) -> int:
        """Vectors that are summed over rows."""
        return 2 * (self.a + self.b)


def rows_per_program(needed: Needed, width: int) -> int:
    """One tile where rows have nothing in common: the weights come from the first-level cache."""
    return ROWS_SUMMED if needed.sums else _tile(width)


def forward_call(inputs: Inputs, out: Tensor | None, normed: Tensor | None, statistics: Tensor, eps: float) -> Call:
    """Fills out [R, C] (None without norm a), normed [R, C] (None without b) and statistics fp32 [R, 2 * norms]."""
    from megacog_kernels.norm.kernels import norm_forward

    R, C = inputs.y.shape
    named = {"x": inputs.x, "y": inputs.y, "out": out, "normed": normed, "statistics": statistics}
    named |= {"weight_a": inputs.weight_a, "bias_a": inputs.bias_a}
    named |= {"weight_b": inputs.weight_b, "bias_b": inputs.bias_b}
    rows = _tile(C)
    sizes = {"rows_per_program": rows, "rows": R, "eps": eps}
    return Call(norm_forward, _pointers(named, inputs.y) | sizes, _constants(inputs), -(-R // rows), _warps(C, 64))


def backward_call(
    inputs: Inputs,
    grad_out: Tensor | None,
    grad_normed: Tensor | None,
    out: Tensor | None,
    statistics: Tensor,
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    partial: Tensor,
    needed: Needed,
) -> Call:
    """Fills grad_x and grad_y [R, C] where needed, and partial fp32 [programs, needed.sums, C].

    grad_out is None without norm a, grad_normed without norm b, and out where it is y, or not needed.
    """
    from megacog_kernels.norm.kernels import norm_backward

    R, C = inputs.y.shape
    named = {"grad_out": grad_out, "grad_normed": grad_normed, "out": out, "y": inputs.y, "partial": partial}
    named |= {"weight_a": inputs.weight_a, "weight_b": inputs.weight_b, "statistics": statistics}
    named |= {"grad_x": grad_x, "grad_y": grad_y}
    rows = rows_per_program(needed, C)
    sizes = {"rows_per_program": rows, "rows": R}
    constants = _constants(inputs) | {"GRAD_X": needed.x, "GRAD_Y": needed.y, "GRAD_A": needed.a, "GRAD_B": needed.b}
    warps = _warps(C, 104, summed=True) if needed.sums else _warps(C, 80)
    return Call(norm_backward, _pointers(named, inputs.y) | sizes, constants, -(-R // rows), warps)


def _pointers(named: dict[str, Tensor | None], instead: Tensor) -> dict[str, object]:
    """Tensors that there are not are never touched, but a kernel's argument has to be something."""
    return {name: instead if tensor is None else tensor for name, tensor in named.items()}


def _constants(inputs: Inputs) -> dict[str, int | bool]:
    width = inputs.y.shape[1]
    shape = {"WIDTH": width, "BLOCK": _block(width), "TILE": _tile(width)}
    return shape | {"RESIDUAL": inputs.weight_a is not None, "NORMED": inputs.weight_b is not None}


def _warps(width: int, registers: int, summed: bool = False) -> Warps:
    """8 or 16 elements per thread, and as many programs as leave a thread that many registers.

    From ahead-of-time compiles at width 3072: no spills in bf16 and fp16 (docs/kernels.md).
    """
    elements = _block(width) * _tile(width)
    warps = max(elements // (32 * (8 if summed or elements > 4096 else 16)), 1)
    return Warps(warps, max(65536 // (registers * 32 * warps), 1))


def _block(width: int) -> int:
    """Elements that a row takes."""
    return 1 << (width - 1).bit_length()


def _tile(width: int) -> int:
    """Rows at once: several where they are short. Divides ROWS_SUMMED."""
    return max(min(1024 // _block(width), ROWS_SUMMED), 1)


def run_forward(inputs: Inputs, eps: float) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """out, normed and statistics; None where there is none."""
    out = None if inputs.weight_a is None else torch.empty_like(inputs.y)
    normed = None if inputs.weight_b is None else torch.empty_like(inputs.y)
    statistics = inputs.y.new_empty(inputs.y.shape[0], 2 * inputs.norms, dtype=torch.float32)
    forward_call(inputs, out, normed, statistics, eps).run()
    return out, normed, statistics


def run_backward(
    inputs: Inputs,
    grad_out: Tensor | None,
    grad_normed: Tensor | None,
    out: Tensor | None,
    statistics: Tensor,
    needed: Needed,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of x and y, None where not needed, and those of weights and biases: fp32 [needed.sums, C]."""
    R, C = inputs.y.shape
    grad_x = torch.empty_like(inputs.y) if needed.x else None
    grad_y = torch.empty_like(inputs.y) if needed.y else None
    partial = inputs.y.new_empty(-(-R // rows_per_program(needed, C)), needed.sums, C, dtype=torch.float32)
    backward_call(inputs, grad_out, grad_normed, out, statistics, grad_x, grad_y, partial, needed).run()
    return grad_x, grad_y, partial.sum(0)


def variants(dtype: torch.dtype, width: int = 3072) -> Iterator[tuple[str, Call]]:
    """Every kernel that the ops can launch, by name, on tensors without storage."""
    rows = torch.empty(4096, width, dtype=dtype, device="meta")
    vector = torch.empty(width, dtype=dtype, device="meta")
    floats = torch.empty(4096, 4, device="meta")
    for name, a, b in (("layer_norm", False, True), ("residual_norm", True, False), ("sandwich_norm", True, True)):
        inputs = Inputs(rows, vector if a else None, vector if b else None, rows, vector, vector)
        yield f"{name} forward", forward_call(inputs, rows, rows, floats, 1e-5)
        for trained in (False, True):
            needed = Needed(a and b, True, trained and a, trained and b)
            call = backward_call(inputs, rows, rows, rows, floats, rows, rows, floats, needed)
            yield f"{name} backward{', weights' if trained else ''}", call
