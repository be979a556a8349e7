"""Sequence parallelism: ranks that share every sample and trade rows for heads around attention (DeepSpeed-Ulysses).

A rank holds the same cells of every frame, an equal share of them: its frame rows go through everything that works
row by row. Around attention one all-to-all hands every rank all rows of its share of the heads, another one
brings the rows back. So masks are those of the whole grid, and every rank has as many predicted rows as any
other: the mean over ranks of the losses of their own rows is the loss of the sample.

Text rows are few; every rank computes all of them, and attention takes its own heads of their keys and values.

Legend: B batch, T frames, P cells of a frame, F = T * P, U ranks of the group, O = P / U own cells, R = T * O own
rows, N heads, H = N / U own heads, D head dim, C width, X numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class SequenceParallel:
    """This rank's place among the ranks that share every sample. `size` divides heads and cells of a frame."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def own_cells(self, x: Tensor, dim: int = -1) -> Tensor:
        """This rank's cells of a dimension that holds those of one frame: a view."""
        return x if self.size == 1 else x.chunk(self.size, dim)[self.rank]

    def own_rows(self, x_BFC: Tensor, cells: int) -> Tensor:
        """This rank's rows [B, R, C] of frames of `cells` cells each."""
        return x_BFC if self.size == 1 else self.own_cells(x_BFC.unflatten(1, (-1, cells)), dim=2).flatten(1, 2)

    def own_heads(self, x_BLND: Tensor) -> Tensor:
        """This rank's heads [B, L, H, D] of rows that every rank holds: a view."""
        return x_BLND if self.size == 1 else x_BLND.chunk(self.size, dim=2)[self.rank]

    def over_all_rows(self, attend: Callable[..., Tensor], cells: int) -> Callable[..., Tensor]:
        """Attention of own rows over the rows of all ranks: q, k, v [B, R, N, D] to [B, R, N, D].

        Args:
            attend: Attention of q, k, v [B, F, H, D] of all rows and this rank's heads.
            cells: Of one frame.
        """
        if self.size == 1:
            return attend
        own = cells // self.size

        def attend_own(q_BRND: Tensor, k_BRND: Tensor, v_BRND: Tensor) -> Tensor:
            return self._to_rows(attend(*self._to_heads(own, q_BRND, k_BRND, v_BRND)), own)

        return attend_own

    def _to_heads(self, own: int, *parts_BRND: Tensor) -> list[Tensor]:
        """All rows of this rank's heads [B, F, H, D], by one all-to-all for all tensors."""
        sent = [part.unflatten(2, (self.size, -1)).unflatten(1, (-1, own)).movedim(3, 0) for part in parts_BRND]
        received_UX = _Exchange.apply(torch.cat([part.flatten(1) for part in sent], dim=1), self.group)
        split = received_UX.split([part[0].numel() for part in sent], dim=1)
        parts_UBTOHD = [rows.view(part.shape) for rows, part in zip(split, sent, strict=True)]
        return [part.movedim(0, 2).flatten(1, 3) for part in parts_UBTOHD]

    def _to_rows(self, x_BFHD: Tensor, own: int) -> Tensor:
        """All heads of this rank's rows: [B, R, N, D]."""
        sent_UBTOHD = x_BFHD.unflatten(1, (-1, self.size, own)).movedim(2, 0)
        received_UX = _Exchange.apply(sent_UBTOHD.flatten(1), self.group)
        return received_UX.view(sent_UBTOHD.shape).movedim(0, 3).flatten(3, 4).flatten(1, 2)


ALONE = SequenceParallel()
"""The place of a rank that has its samples to itself."""


class RowDropout(nn.Dropout):
    """Dropout of text rows, and of frame rows that are cut over the ranks of a sequence.

    Ranks of a sequence draw the same random numbers: text rows lose the same on all of them. For frame rows the
    numbers of all rows are drawn, and each rank uses its own: what is dropped does not depend on the number of ranks.
    """

    def __init__(self, p: float, sequence: SequenceParallel, cells: int) -> None:
        super().__init__(p)
        self._sequence = sequence
        self._cells = cells

    def forward(self, x_BRC: Tensor, frames: bool = False) -> Tensor:  # type: ignore[override]
        """[B, R, C]; `frames` says that these are this rank's frame rows."""
        if not (frames and self.training and self.p) or self._sequence.size == 1:
            return super().forward(x_BRC)
        B, R, C = x_BRC.shape
        kept_BFC = super().forward(x_BRC.new_ones(B, R * self._sequence.size, C))
        return x_BRC * self._sequence.own_rows(kept_BFC, self._cells)


class _Exchange(torch.autograd.Function):
    """Row j of rank i becomes row i of rank j, of [U, X]; its own inverse, so its own gradient."""

    @staticmethod
    def forward(ctx: Any, x_UX: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x_UX = x_UX.contiguous()
        received_UX = torch.empty_like(x_UX)
        dist.all_to_all_single(received_UX, x_UX, group=group)
        return received_UX

    @staticmethod
    def backward(ctx: Any, grad_UX: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Exchange.apply(grad_UX, ctx.group), None
