"""Key/value caches: frames given whole, then codes one at a time.

Keys and values of both channels stand in static buffers, one slot per frame token after those of the
text. Attention of a new row reads the slots that the mask rule names (`decode_attention`), so any order
table and space works, and nothing here knows a stage's name. Nothing depends on a position on the host.

Legend: B batch, L text length, P cells of a frame, F frame tokens, S slots (L + frame slots), R new rows,
N heads of this rank, D head dim, C width, V image codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacog.config.schema import Stage
from megacog.model.attention import Attend, KeyValue
from megacog.model.layer import attend_all
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog_kernels.attention import Implementation, decode_attention
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid


@dataclass(frozen=True)
class _Place:
    """Where a new row stands among a channel's frame slots, on the device."""

    slot_1: Tensor
    """int64 [1]."""
    token_B1: Tensor
    """int32 [B, 1]: the same for `decode_attention`."""


class _Base:
    """The base channel of one layer: text, then slots of the one frame that is being sampled.

    Nobody else sees the rows of a frame here, so no other frame is kept.
    """

    def __init__(self, text: KeyValue, grid: VideoGrid, text_bias: float, kernels: Implementation) -> None:
        self.frame = VideoGrid(1, grid.height, grid.width)
        self.buffers = _Buffers(text, self.frame.tokens, text_bias)
        self.kernels = kernels

    def give(self, frames: Sequence[int], order: Order, valid_BL: Tensor) -> Attend:
        """Attention of whole frames that are known together."""
        level, is_open = zip(*((order.level[frame], order.open[frame]) for frame in frames), strict=True)
        mask = MaskSpec(Order(level, is_open), Space("frame"))
        grid = VideoGrid(len(frames), self.frame.height, self.frame.width)
        return attend_all(mask, grid, self.buffers.text, valid_BL, self.kernels, self.buffers.text_bias)

    def step(self, place: _Place, valid_BL: Tensor) -> Attend:
        """Attention of one new row, placed by its cell."""
        mask = MaskSpec(Order.sequential(1), Space())
        return self.buffers.attend(place, valid_BL, mask, self.frame, self.kernels)


class _Plus:
    """The attention-plus channel of one layer: text, then a slot per frame token."""

    def __init__(
        self, text: KeyValue, mask: MaskSpec, grid: VideoGrid, text_bias: float, kernels: Implementation
    ) -> None:
        self.mask, self.grid, self.kernels = mask, grid, kernels
        self.buffers = _Buffers(text, grid.tokens, text_bias)

    def give(self, frames: Sequence[int], order: Order, valid_BL: Tensor) -> Attend:
        """Attention of whole frames that are known together, written to the buffers first."""

        def attend(q_BRND: Tensor, k_BRND: Tensor, v_BRND: Tensor) -> Tensor:
            cells = torch.arange(self.grid.cells, device=q_BRND.device)
            rows_R = torch.cat([frame * self.grid.cells + cells for frame in frames])
            self.buffers.write(rows_R, k_BRND, v_BRND)
            # All frames go through, empty ones too, so that the op of training serves: what is given sees no other.
            q_BFND = q_BRND.new_zeros(q_BRND.shape[0], self.grid.tokens, *q_BRND.shape[2:])
            q_BFND[:, rows_R] = q_BRND
            everything = attend_all(
                self.mask, self.grid, self.buffers.text, valid_BL, self.kernels, self.buffers.text_bias
            )
            return everything(q_BFND, *self.buffers.frames)[:, rows_R]

        return attend

    def step(self, place: _Place, valid_BL: Tensor) -> Attend:
        """Attention of one new row, placed by frame and cell."""
        return self.buffers.attend(place, valid_BL, self.mask, self.grid, self.kernels)


class _Buffers:
    """Static keys and values of one channel: text, then frame slots."""

    def __init__(self, text: KeyValue, slots: int, text_bias: float) -> None:
        self.text_bias = text_bias
        B, self.text_length, N, D = text[0].shape
        # Heads before slots: the keys of a head lie together.
        kv_2BNSD = text[0].new_zeros(2, B, N, self.text_length + slots, D)
        self.k_BSND, self.v_BSND = kv_2BNSD.transpose(2, 3)
        self.k_BSND[:, : self.text_length], self.v_BSND[:, : self.text_length] = text

    @property
    def text(self) -> KeyValue:
        """[B, L, N, D]."""
        return self.k_BSND[:, : self.text_length], self.v_BSND[:, : self.text_length]

    @property
    def frames(self) -> KeyValue:
        """[B, S - L, N, D]."""
        return self.k_BSND[:, self.text_length :], self.v_BSND[:, self.text_length :]

    def write(self, rows_R: Tensor, k_BRND: Tensor, v_BRND: Tensor) -> None:
        """Put new rows into their frame slots."""
        for buffer, new in zip(self.frames, (k_BRND, v_BRND), strict=True):
            buffer.index_copy_(1, rows_R, new)

    def attend(
        self, place: _Place, valid_BL: Tensor, mask: MaskSpec, grid: VideoGrid, kernels: Implementation
    ) -> Attend:
        """Attention that first writes its one new row. The position stays on the device."""

        def attend(q_B1ND: Tensor, k_B1ND: Tensor, v_B1ND: Tensor) -> Tensor:
            self.write(place.slot_1, k_B1ND, v_B1ND)
            kv = (self.k_BSND, self.v_BSND)
            return decode_attention(
                q_B1ND, *kv, valid_BL, place.token_B1, mask, grid, text_bias=self.text_bias, implementation=kernels
            )

        return attend


class Decoder:
    """Incremental forward pass of a batch through one stage.

    Args:
        model: In eval mode; weights of any dtype.
        stage: Layout and attention-plus; `base` has one frame.
        text_BL: int64 text pieces, padded on the left.
        text_valid_BL: bool, False on padding.
        plus: False runs the base channel only.
        text_bias: Added to the scores of frame rows and text keys, in both channels.

    The text runs through the model at construction. For guidance, put both texts into one batch.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: CogVideo,
        stage: Stage,
        text_BL: Tensor,
        text_valid_BL: Tensor,
        plus: bool = True,
        text_bias: float = 0.0,
    ) -> None:
        self.model = model
        self.layout = stage_layout(model.config, stage)
        self.plus = model.plus_of(stage)
        self.plus_layers = list(self.plus.layers) if self.plus is not None and plus else [None] * len(model.layers)
        grid = self.layout.grid
        self.valid_BL = text_valid_BL
        self.slot_F = torch.arange(grid.tokens, device=text_BL.device)
        self.token_BF = self.slot_F.int().expand(len(text_BL), -1)
        self.base: list[_Base] = []
        self.plus_channels: list[_Plus | None] = []
        rows_BLC = model.embed_text(text_BL, text_valid_BL)
        for index, (layer, plus_layer) in enumerate(zip(model.layers, self.plus_layers, strict=True)):
            rows_BLC, states = layer.text_rows(rows_BLC, text_valid_BL)
            self.base.append(_Base(states.base, grid, text_bias, model.kernels))
            channel = None
            if plus_layer is not None:
                mask = self.layout.plus_mask(model.space(stage), index)
                channel = _Plus(plus_layer.project_text(states.normed_BLC), mask, grid, text_bias, model.kernels)
            self.plus_channels.append(channel)

    @torch.no_grad()
    def give(self, frames: Mapping[int, Tensor]) -> None:
        """Write known frames {frame: codes [B, P] int64} into the caches.

        Frames of one level that are open see each other, so they must be given in one call.
        """
        levels = sorted({self.layout.order.level[frame] for frame in frames})
        for level in levels:
            peers = [frame for frame in sorted(frames) if self.layout.order.level[frame] == level]
            rows = [self._frame_inputs(frame, frames[frame]) for frame in peers]
            order, valid_BL = self.layout.order, self.valid_BL
            self._rows(
                torch.cat(rows, dim=1),
                lambda base: base.give(peers, order, valid_BL),  # noqa: B023
                lambda plus: plus.give(peers, order, valid_BL),  # noqa: B023
            )

    @torch.no_grad()
    def step(self, frame: int, cell: int, previous_B: Tensor | None) -> Tensor:
        """fp32 logits [B, V] for the code at (frame, cell).

        Args:
            frame, cell: Where the code stands; cells of a frame come in raster order.
            previous_B: int64 codes of cell - 1 of this frame; None at cell 0.
        """
        if (cell == 0) != (previous_B is None):
            raise ValueError(f"cell {cell} needs {'no' if cell == 0 else 'the'} previous code")
        if previous_B is None:
            inputs_B1C = self.model.embed_boi(self.valid_BL.shape[0])
        else:
            inputs_B1C = self.model.code_embedding(previous_B[:, None])
        rows_B1C = self.model.embed_frame(inputs_B1C, frame, slice(cell, cell + 1), self.plus)
        in_frame, in_clip = self._place(cell), self._place(frame * self.layout.grid.cells + cell)
        hidden_B1C = self._rows(
            rows_B1C,
            lambda base: base.step(in_frame, self.valid_BL),
            lambda plus: plus.step(in_clip, self.valid_BL),
        )
        return self.model.code_logits(hidden_B1C)[:, 0]

    def _place(self, slot: int) -> _Place:
        return _Place(self.slot_F[slot : slot + 1], self.token_BF[:, slot : slot + 1])

    def _frame_inputs(self, frame: int, codes_BP: Tensor) -> Tensor:
        boi_B1C = self.model.embed_boi(codes_BP.shape[0])
        inputs_BPC = torch.cat([boi_B1C, self.model.code_embedding(codes_BP[:, :-1])], dim=1)
        return self.model.embed_frame(inputs_BPC, frame, slice(None), self.plus)

    def _rows(
        self, rows_BRC: Tensor, attend_base: Callable[[_Base], Attend], attend_plus: Callable[[_Plus], Attend]
    ) -> Tensor:
        channels = zip(self.base, self.plus_channels, strict=True)
        for layer, plus_layer, (base, plus) in zip(self.model.layers, self.plus_layers, channels, strict=True):
            plus_attend = attend_plus(plus) if plus is not None else None
            rows_BRC = layer.frame_rows(rows_BRC, attend_base(base), plus_layer, plus_attend)
        return rows_BRC
