"""Arguments of the mix kernels: to run them, or to compile them ahead of time.

Legend: R rows, C width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megacog_kernels.launch import Call, Warps

TILE = 2
"""Rows at once."""
FORWARD_STEPS = 4
SUM_STEPS = 32
"""Steps of TILE rows per program. Where the logit's gradient is summed they are the same on every device, so that
the order of the sum is too; the partial sums are then 2 * 4 / (64 * 10) = 1.3 % of what the pass moves in bf16."""


@dataclass(frozen=True)
class Needed:
    """Which gradients a backward pass has to make."""

    base: bool
    plus: bool
    logit: bool

    @property
    def steps(self) -> int:
        """Steps of one program."""
        return SUM_STEPS if self.logit else FORWARD_STEPS


def forward_call(base: Tensor, plus: Tensor, logit: Tensor, out: Tensor) -> Call:
    """Fills out [R, C]; all are contiguous."""
    from megacog_kernels.mix.kernels import mix_forward

    arguments = {"base": base, "plus": plus, "logit": logit, "out": out}
    return _call(mix_forward, arguments, {}, base.shape, FORWARD_STEPS, resident=8)


def backward_call(
    grad_out: Tensor,
    base: Tensor | None,
    plus: Tensor | None,
    logit: Tensor,
    grad_base: Tensor | None,
    grad_plus: Tensor | None,
    partial: Tensor | None,
    needed: Needed,
) -> Call:
    """Fills grad_base and grad_plus [R, C] where needed, and partial fp32 [chunks, C] if the logit's is.

    base and plus are read for the logit's gradient only.
    """
    from megacog_kernels.mix.kernels import mix_backward

    named = {"base": base, "plus": plus, "grad_base": grad_base, "grad_plus": grad_plus, "partial": partial}
    # Tensors that there are not are never touched, but a kernel's argument has to be something.
    arguments = {name: grad_out if tensor is None else tensor for name, tensor in named.items()}
    arguments |= {"grad_out": grad_out, "logit": logit}
    constants = {"BASE": needed.base, "PLUS": needed.plus, "LOGIT": needed.logit}
    return _call(mix_backward, arguments, constants, grad_out.shape, needed.steps, resident=6)


def _call(
    kernel: object, arguments: dict[str, Tensor], constants: dict, shape: torch.Size, steps: int, resident: int
) -> Call:
    R, C = shape
    block = min(1 << (C - 1).bit_length(), 1024)
    column_blocks = -(-C // block)
    sizes = {"column_blocks": column_blocks, "row_steps": steps, "rows": R}
    constants = {"WIDTH": C, "TILE": TILE, "BLOCK": block} | constants
    return Call(kernel, arguments | sizes, constants, column_blocks * _chunks(R, steps), Warps(4, resident))


def _chunks(rows: int, steps: int) -> int:
    return -(-rows // (steps * TILE))


def run_forward(base: Tensor, plus: Tensor, logit: Tensor) -> Tensor:
    """The mix [R, C]."""
    out = torch.empty_like(base)
    forward_call(base, plus, logit, out).run()
    return out


def run_backward(
    grad_out: Tensor, base: Tensor | None, plus: Tensor | None, logit: Tensor, needed: Needed
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of base and plus [R, C] and of the logit [C]; None where not needed."""
    R, C = grad_out.shape
    grad_base = torch.empty_like(grad_out) if needed.base else None
    grad_plus = torch.empty_like(grad_out) if needed.plus else None
    partial = grad_out.new_empty(_chunks(R, needed.steps), C, dtype=torch.float32) if needed.logit else None
    backward_call(grad_out, base, plus, logit, grad_base, grad_plus, partial, needed).run()
    if partial is None:
        return grad_base, grad_plus, None
    share_C = logit.float().sigmoid()
    return grad_base, grad_plus, (partial.sum(0) * share_C * (1 - share_C)).to(logit.dtype)


def variants(dtype: torch.dtype, width: int = 3072) -> Iterator[tuple[str, Call]]:
    """Every kernel that the op can launch in training, by name, on tensors without storage."""
    rows = torch.empty(4096, width, dtype=dtype, device="meta")
    logit = torch.empty(width, dtype=dtype, device="meta")
    partial = torch.empty(64, width, device="meta")
    yield "mix forward", forward_call(rows, rows, logit, rows)
    for name, base in (("mix backward", True), ("mix backward, not of base", False)):
        yield name, backward_call(rows, rows, rows, logit, rows, rows, partial, Needed(base, True, True))
