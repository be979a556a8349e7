"""Key/value caches: frames given whole, then codes, one or a few at a time.

Keys and values of both channels stand in static buffers, one slot per frame token after those of the
text. Attention of a new row reads the slots that the mask rule names (`decode_attention`), so any order
table and space works, and nothing here knows a stage's name. Where new rows stand is known on the device only.

Legend: B batch, L text length, P cells of a frame, F frame tokens, S slots (L + frame slots), R new rows of each
sample, N heads of this rank, D head dim, C width, V image codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacog.config.schema import Stage
from megacog.generation.reading import Reader
from megacog.model.attention import Attend, KeyValue
from megacog.model.layer import attend_all
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog_kernels.attention import Implementation, decode_attention
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid


@dataclass(frozen=True)
class _Place:
    """Where new rows stand among a channel's frame slots, on the device."""

    slot_R: Tensor
    """int64."""
    token_BR: Tensor
    """int32: the same for `decode_attention`."""


class _Base:
    """The base channel of one layer: text, then a lane of slots for each frame that is being sampled.

    Nobody else sees the rows of a frame here, so no other frame is kept, and a complete one leaves its lane to another.
    """

    def __init__(self, text: KeyValue, lanes: VideoGrid, text_bias: float, kernels: Implementation) -> None:
        self.lanes = lanes
        self.mask = MaskSpec(Order.sequential(lanes.frames), Space("frame"))
        self.buffers = _Buffers(text, lanes.tokens, text_bias)
        self.kernels = kernels

    def give(self, frames: Sequence[int], order: Order, valid_BL: Tensor) -> Attend:
        """Attention of whole frames that are known together."""
        level, is_open = zip(*((order.level[frame], order.open[frame]) for frame in frames), strict=True)
        mask = MaskSpec(Order(level, is_open), Space("frame"))
        grid = VideoGrid(len(frames), self.lanes.height, self.lanes.width)
        return attend_all(mask, grid, self.buffers.text, valid_BL, self.kernels, self.buffers.text_bias)

    def step(self, place: _Place, valid_BL: Tensor) -> Attend:
        """Attention of new rows, placed by lane and cell."""
        return self.buffers.attend(place, valid_BL, self.mask, self.lanes, self.kernels)


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
        """Attention of new rows, placed by frame and cell."""
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
        """Attention that first writes its new rows. Their positions stay on the device."""

        def attend(q_BRND: Tensor, k_BRND: Tensor, v_BRND: Tensor) -> Tensor:
            self.write(place.slot_R, k_BRND, v_BRND)
            kv = (self.k_BSND, self.v_BSND)
            return decode_attention(
                q_BRND, *kv, valid_BL, place.token_BR, mask, grid, text_bias=self.text_bias, implementation=kernels
            )

        return attend


def stage_masks(model: CogVideo, stage: Stage, plus: bool = True) -> tuple[MaskSpec, ...]:
    """Every mask that frame rows of a stage meet, in either channel of any layer."""
    layout = stage_layout(model.config, stage)
    masks = [layout.base_mask]
    if plus and model.plus_of(stage) is not None:
        masks += [layout.plus_mask(model.space(stage), index) for index in range(len(model.layers))]
    return tuple(dict.fromkeys(masks))


class Decoder:
    """Incremental forward pass of a batch through one stage.

    Args:
        model: In eval mode; weights of any dtype.
        stage: Layout and attention-plus; `base` has one frame.
        text_BL: int64 text pieces, padded on the left; on any device.
        text_valid_BL: bool, False on padding.
        plus: False runs the base channel only.
        text_bias: Added to the scores of frame rows and text keys, in both channels.
        lane: Of every frame; frames that are in progress at the same time need different ones. None: one after another.
        reader: Runs and remembers the texts; None = this decoder's own.

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
        lane: Sequence[int] | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.model = model
        self.layout = stage_layout(model.config, stage)
        self.plus = model.plus_of(stage)
        self.plus_layers = list(self.plus.layers) if self.plus is not None and plus else [None] * len(model.layers)
        grid, device = self.layout.grid, model.device
        self.valid_BL = text_valid_BL.to(device)
        lane = lane if lane is not None else [0] * grid.frames
        lanes = VideoGrid(max(lane) + 1, grid.height, grid.width)
        cell_F = torch.arange(grid.tokens, device=device) % grid.cells
        self.lane_slot_F = torch.tensor(lane, device=device).repeat_interleave(grid.cells) * grid.cells + cell_F
        self.is_first_F1 = (cell_F == 0)[:, None]
        self.boi_11C = model.embed_boi(1)
        no_input_1PC = torch.zeros(1, grid.cells, self.boi_11C.shape[2], dtype=self.boi_11C.dtype, device=device)
        places = [model.embed_frame(no_input_1PC, frame, slice(None), self.plus) for frame in range(grid.frames)]
        self.position_FC = torch.cat(places, dim=1)[0]
        self.base: list[_Base] = []
        self.plus_channels: list[_Plus | None] = []
        texts = (reader or Reader(model)).states(stage, text_BL, text_valid_BL, plus)
        for index, states in enumerate(texts):
            self.base.append(_Base(states.base, lanes, text_bias, model.kernels))
            channel = None
            if states.plus is not None:
                mask = self.layout.plus_mask(model.space(stage), index)
                channel = _Plus(states.plus, mask, grid, text_bias, model.kernels)
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
    def step(self, token_R: Tensor, previous_BR: Tensor) -> Tensor:
        """fp32 logits [B, R, V] of the codes at `token_R`. The host learns nothing of where they are.

        Args:
            token_R: int64, frame * P + cell, each of another frame; cells of a frame come in raster order, and what
                the masks show of other frames is in the caches.
            previous_BR: int64 codes of the cells before; at cell 0 any code.
        """
        inputs_BRC = torch.where(self.is_first_F1[token_R], self.boi_11C, self.model.code_embedding(previous_BR))
        in_lane, in_clip = self._place(self.lane_slot_F[token_R]), self._place(token_R)
        hidden_BRC = self._rows(
            inputs_BRC + self.position_FC[token_R],
            lambda base: base.step(in_lane, self.valid_BL),
            lambda plus: plus.step(in_clip, self.valid_BL),
        )
        return self.model.code_logits(hidden_BRC)

    def _place(self, slot_R: Tensor) -> _Place:
        return _Place(slot_R, slot_R.int().expand(self.valid_BL.shape[0], -1))

    def _frame_inputs(self, frame: int, codes_BP: Tensor) -> Tensor:
        inputs_BPC = self.model.code_embedding(codes_BP[:, :-1])
        boi_B1C = self.boi_11C.expand(codes_BP.shape[0], -1, -1)
        return self.model.embed_frame(torch.cat([boi_B1C, inputs_BPC], dim=1), frame, slice(None), self.plus)

    def _rows(
        self, rows_BRC: Tensor, attend_base: Callable[[_Base], Attend], attend_plus: Callable[[_Plus], Attend]
    ) -> Tensor:
        channels = zip(self.base, self.plus_channels, strict=True)
        for layer, plus_layer, (base, plus) in zip(self.model.layers, self.plus_layers, channels, strict=True):
            plus_attend = attend_plus(plus) if plus is not None else None
            rows_BRC = layer.frame_rows(rows_BRC, attend_base(base), plus_layer, plus_attend)
        return rows_BRC
