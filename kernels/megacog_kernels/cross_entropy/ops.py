"""Public linear head + logsumexp, for eager and compiled models, with gradients.

Legend: X rows, C width, V columns (rows of the weight).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megacog_kernels.cross_entropy import chunks, reference
from megacog_kernels.dispatch import Implementation, choose


class LinearLogSumExp(NamedTuple):
    """What cross entropy needs of every row: it is lse - target."""

    lse: Tensor
    """fp32 [X]: logsumexp of the row's logits; -inf without columns."""
    target: Tensor
    """fp32 [X]: the target's logit; 0 where the target is no column."""


def linear_logsumexp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_bytes: int = chunks.CHUNK_BYTES,
    implementation: Implementation = "auto",
) -> LinearLogSumExp:
    """Logsumexp and target of logits = hidden @ weight^T, which never exist as a whole.

    Cross entropy over all columns is lse - target. Where columns are cut over ranks, lse of the whole is the
    logsumexp of the ranks' lse, and target the sum of the ranks' targets. The backward pass computes the
    logits again; only gradients that are needed are computed, bitwise the same in every run.

    Args:
        hidden: [X, C] bf16, fp16 or fp32, X may be 0.
        weight: [V, C] in the dtype of hidden, V may be 0.
        targets: int64 [X]: each row's column; outside [0, V) = none of these.
        chunk_bytes: Size of the buffer that logits pass through.
        implementation: `auto` runs Triton where it can; `triton` insists on it.

    Raises:
        ValueError: An argument does not fit, by name and shape, or Triton cannot run as asked.
    """
    _check(hidden, weight, targets)
    size = f"{weight.shape[0]} columns"
    triton = choose("linear cross entropy", implementation, hidden.device, hidden.dtype, size) == "triton"
    rows = chunks.chunk_rows(weight.shape[0], hidden.dtype, chunk_bytes)
    return LinearLogSumExp(*torch.ops.megacog.linear_logsumexp(hidden, weight, targets.contiguous(), rows, triton))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} are not [X, C] and [V, C]")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {tuple(targets.shape)} {targets.dtype}; ({hidden.shape[0]},) torch.int64 fits "
            f"hidden {tuple(hidden.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight {tuple(weight.shape)} is {weight.dtype}, hidden is {hidden.dtype}")
    for name, tensor in (("weight", weight), ("targets", targets)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} {tuple(tensor.shape)} is on {tensor.device}, hidden on {hidden.device}")


def _functions(triton: bool) -> chunks.RowFunctions:
    """How rows are worked on. Imports Triton, which only this path needs."""
    if not triton:
        return chunks.RowFunctions(reference.summarize_rows, reference.differentiate_rows)
    from megacog_kernels.cross_entropy import calls

    return chunks.RowFunctions(
        lambda *tensors: calls.summarize_call(*tensors).run(), lambda *tensors: calls.differentiate_call(*tensors).run()
    )


@torch.library.custom_op("megacog::linear_logsumexp", mutates_args=())
def _linear_logsumexp(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, triton: bool
) -> tuple[Tensor, Tensor]:
    """lse and target, fp32 [X] each, by chunks of `rows`."""
    return chunks.forward(hidden, weight, targets, rows, _functions(triton))


@_linear_logsumexp.register_fake
def _(hidden: Tensor, weight: Any, targets: Any, rows: Any, triton: Any) -> Any:
    empty = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return empty, torch.empty_like(empty)


@torch.library.custom_op("megacog::linear_logsumexp_backward", mutates_args=())
def _linear_logsumexp_backward(
    grad_lse: Tensor,
    grad_target: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: int,
    triton: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight, empty where not `needed`."""
    grads = (grad_lse.contiguous(), grad_target.contiguous())
    got = chunks.backward(
        *grads, lse, hidden, weight, targets, rows, _functions(triton), (needed[0], needed[1])
    )  # fmt: skip
    first, second = (hidden.new_empty(0) if part is None else part for part in got)
    return first, second


@_linear_logsumexp_backward.register_fake
def _(
    grad_lse: Any, grad_target: Any, lse: Any, hidden: Tensor, weight: Tensor, targets: Any, rows: Any, triton: Any,
    needed: Sequence[bool],
) -> Any:  # fmt: skip
    parts = zip((hidden, weight), needed, strict=True)
    return tuple(hidden.new_empty(part.shape if want else 0) for part, want in parts)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.rows, ctx.triton = inputs
    ctx.save_for_backward(output[0], *tensors)


def _backward(ctx: Any, grad_lse: Tensor, grad_target: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:2])
    gradients = torch.ops.megacog.linear_logsumexp_backward(
        grad_lse, grad_target, *ctx.saved_tensors, ctx.rows, ctx.triton, needed
    )
    return (*(part if want else None for part, want in zip(gradients, needed, strict=True)), None, None, None)


_linear_logsumexp.register_autograd(_backward, setup_context=_save)
