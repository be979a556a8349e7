"""Public mix, for eager and compiled models, with gradients.

Legend: C width, `...` any leading dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megacog_kernels.dispatch import Implementation, choose
from megacog_kernels.mix import reference
from megacog_kernels.mix.calls import Needed, run_backward, run_forward


def mix(base: Tensor, plus: Tensor, logit: Tensor, *, implementation: Implementation = "auto") -> Tensor:
    """a * base + (1 - a) * plus, a = sigmoid(logit) per channel, in one pass over memory.

    Gradients are bitwise the same in every run; only those that are needed are computed.

    Args:
        base, plus: [..., C], of one shape and dtype; rows that are not contiguous are copied.
        logit: [C], of the same dtype.
        implementation: `auto` runs Triton where it can; `triton` insists on it.

    Raises:
        ValueError: An argument does not fit, by name and shape, or Triton cannot run as asked.
    """
    _check(base, plus, logit)
    if choose("mix", implementation, base.device, base.dtype, f"width {base.shape[-1]}") == "reference":
        return reference.mix(base, plus, logit)
    return torch.ops.megacog.mix(base.contiguous(), plus.contiguous(), logit.contiguous())


def _check(base: Tensor, plus: Tensor, logit: Tensor) -> None:
    if base.dim() == 0 or base.shape[-1] == 0:
        raise ValueError(f"base {tuple(base.shape)} has no channels in its last dimension")
    for name, tensor, shape in (("plus", plus, base.shape), ("logit", logit, base.shape[-1:])):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {tuple(shape)} fits base {tuple(base.shape)}")
        if tensor.dtype != base.dtype or tensor.device != base.device:
            got, wanted = (f"{part.dtype} on {part.device}" for part in (tensor, base))
            raise ValueError(f"{name} {tuple(tensor.shape)} is {got}, base {tuple(base.shape)} is {wanted}")


def _rows(tensor: Tensor) -> Tensor:
    """All leading dims as one."""
    return tensor.view(-1, tensor.shape[-1])


@torch.library.custom_op("megacog::mix", mutates_args=())
def _mix(base: Tensor, plus: Tensor, logit: Tensor) -> Tensor:
    """The mix of contiguous tensors."""
    return run_forward(_rows(base), _rows(plus), logit).view(base.shape)


@_mix.register_fake
def _(base: Tensor, plus: Any, logit: Any) -> Tensor:
    return torch.empty_like(base)


@torch.library.custom_op("megacog::mix_backward", mutates_args=())
def _mix_backward(
    grad_out: Tensor, base: Tensor | None, plus: Tensor | None, logit: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of base, plus and logit, empty where not needed; base and plus matter to the logit's only."""
    base, plus = (None if part is None else _rows(part) for part in (base, plus))
    grad_base, grad_plus, grad_logit = run_backward(_rows(grad_out), base, plus, logit, Needed(*needed))
    return _shaped(grad_base, grad_out), _shaped(grad_plus, grad_out), _shaped(grad_logit, logit)


def _shaped(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors only: an empty one instead of None."""
    return like.new_empty(0) if gradient is None else gradient.view(like.shape)


@_mix_backward.register_fake
def _(grad_out: Tensor, base: Any, plus: Any, logit: Tensor, needed: Sequence[bool]) -> Any:
    pairs = zip((grad_out, grad_out, logit), needed, strict=True)
    return tuple(like.new_empty(like.shape if wanted else 0) for like, wanted in pairs)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    base, plus, logit = inputs
    ctx.save_for_backward(*((base, plus) if ctx.needs_input_grad[2] else (None, None)), logit)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    base, plus, logit = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.megacog.mix_backward(grad_out.contiguous(), base, plus, logit, needed)
    return tuple(part if wanted else None for part, wanted in zip(gradients, needed, strict=True))


_mix.register_autograd(_backward, setup_context=_save)
