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
from megacog_kernels.norm.calls import MAX_WIDTH, Inputs, Needed, run_backward, run_forward


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
    return _run(None, x, None, None, weight, bias, eps)[1]


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
    return _run(x, y, weight, bias, None, None, eps)[0]


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
    return _run(x, y, weight_a, bias_a, weight_b, bias_b, eps)


def choose_norm(implementation: Implementation, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """`triton` or `reference` (see `megacog_kernels.dispatch`).

    Raises:
        ValueError: Triton is asked for and cannot run, or the name is unknown.
    """
    unfit = f"the kernels know widths up to {MAX_WIDTH}, not {width}" if width > MAX_WIDTH else None
    return choose("layernorm", implementation, device, dtype, f"width {width}", unfit)


def _choose(implementation: Implementation, x: Tensor) -> str:
    return choose_norm(implementation, x.device, x.dtype, x.shape[-1])


def _check(x: Tensor, y: Tensor | None = None, **vectors: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x {tuple(x.shape)} has no channels in its last dimension")
    expected = {name: (vector, x.shape[-1:]) for name, vector in vectors.items()}
    if y is not None:
        expected["y"] = (y, x.shape)
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {tuple(shape)} fits x {tuple(x.shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            got = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} {tuple(tensor.shape)} is {got}, x {tuple(x.shape)} {x.dtype} on {x.device}")


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """out and normed of the operator."""
    adjacent = (part.contiguous() if isinstance(part, Tensor) else part for part in arguments)
    out, normed, _ = torch.ops.megacog.norm(*adjacent)
    return out, normed


def _rows(tensor: Tensor | None) -> Tensor | None:
    """[R, C]."""
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])


def _shaped(rows: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors only: an empty one instead of None."""
    return like.new_empty(0) if rows is None else rows.view(like.shape)


def _like(tensor: Tensor, wanted: bool) -> Tensor:
    return tensor.new_empty(tensor.shape if wanted else 0)


@torch.library.custom_op("megacog::norm", mutates_args=())
def _norm(
    x: Tensor | None,
    y: Tensor,
    weight_a: Tensor | None,
    bias_a: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, normed (empty without their norms) and statistics fp32 [R, 2 * norms]: see kernels.py."""
    inputs = Inputs(y.view(-1, y.shape[-1]), weight_a, weight_b, _rows(x), bias_a, bias_b)
    out, normed, statistics = run_forward(inputs, eps)
    return _shaped(out, y), _shaped(normed, y), statistics


@_norm.register_fake
def _(x: Any, y: Tensor, weight_a: Any, bias_a: Any, weight_b: Any, bias_b: Any, eps: Any) -> Any:
    norms = (weight_a is not None) + (weight_b is not None)
    statistics = y.new_empty(y.numel() // y.shape[-1], 2 * norms, dtype=torch.float32)
    return _like(y, weight_a is not None), _like(y, weight_b is not None), statistics


@torch.library.custom_op("megacog::norm_backward", mutates_args=())
def _norm_backward(
    grad_out: Tensor | None,
    grad_normed: Tensor | None,
    out: Tensor | None,
    y: Tensor,
    weight_a: Tensor | None,
    weight_b: Tensor | None,
    statistics: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and y, empty where not needed, and fp32 [sums, C] those of weight and bias of a, then of b.

    Tensors are contiguous; out where both norms are; `needed` for x, y, a and b.
    """
    inputs = Inputs(y.view(-1, y.shape[-1]), weight_a, weight_b)
    rows = (_rows(grad_out), _rows(grad_normed), _rows(out))
    grad_x, grad_y, sums = run_backward(inputs, *rows, statistics, Needed(*needed))
    return _shaped(grad_x, y), _shaped(grad_y, y), sums


@_norm_backward.register_fake
def _(
    grad_out: Any, grad_normed: Any, out: Any, y: Tensor, weight_a: Any, weight_b: Any, statistics: Any,
    needed: Sequence[bool],
) -> Any:  # fmt: skip
    wanted = Needed(*needed)
    sums = y.new_empty(wanted.sums, y.shape[-1], dtype=torch.float32)
    return _like(y, wanted.x), _like(y, wanted.y), sums


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, y, weight_a, _, weight_b, _, _ = inputs
    out, _, statistics = output
    both = weight_a is not None and weight_b is not None  # else the backward pass reads y only
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out if both else None, y, weight_a, weight_b, statistics)


def _backward(ctx: Any, grad_out: Tensor | None, grad_normed: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    out, y, weight_a, weight_b, statistics = ctx.saved_tensors
    x, y_needed, *parameters = ctx.needs_input_grad[:6]
    by_kernel = x and weight_b is not None  # else the gradient of x is that of out
    needed = [by_kernel, y_needed, any(parameters[:2]), any(parameters[2:])]
    grad_out = _gradient(grad_out, y) if weight_a is not None else None
    grad_normed = _gradient(grad_normed, y) if weight_b is not None else None
    if not any(needed):
        return (grad_out, *[None] * 6)
    got = torch.ops.megacog.norm_backward(grad_out, grad_normed, out, y, weight_a, weight_b, statistics, needed)
    grad_x, grad_y, sums = got
    vectors = iter(sums.to(y.dtype))
    both_norms = ((next(vectors), next(vectors)) if wanted else (None, None) for wanted in needed[2:])
    of_parameters = (part for norm in both_norms for part in norm)
    kept = zip(of_parameters, parameters, strict=True)
    if x and not by_kernel:
        grad_x = grad_out
    return (grad_x if x else None, grad_y if y_needed else None, *(part if want else None for part, want in kept), None)


def _gradient(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.contiguous()


_norm.register_autograd(_backward, setup_context=_save)
