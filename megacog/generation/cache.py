"""Key/value caches: frames given whole, then codes one at a time.

Keys and values of both channels stand in static buffers, one slot per frame token. A new row sees
the text and the slots that the mask rule names (`megacog_kernels.grid.visible`), so any order table
and space works, and nothing here knows a stage's name.

Legend: B batch, L text length, T frames, P cells of a frame, F = T * P, R new rows, K visible keys,
N heads of this rank, D head dim, C width, V image codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from megacog.config.schema import Stage
from megacog.model.attention import Attend
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo, KeyValue
from megacog_kernels.attention import cached_attention
from megacog_kernels.grid import MaskSpec, VideoGrid, visible_keys


@lru_cache(maxsize=4096)
def key_list(
    mask: MaskSpec, grid: VideoGrid, tokens: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Frame tokens that any of `tokens` sees: int64 [K]; and which of them each sees: bool [R, K], None = all."""
    keys_K, allowed_RK = visible_keys(mask, grid, tokens)
    some = None if allowed_RK.all() else torch.from_numpy(allowed_RK).to(device)
    return torch.from_numpy(keys_K).to(device), some


class _Channel:
    """Keys and values of one channel of one layer: text, then a slot per frame token."""

    def __init__(self, text: KeyValue, tokens: int) -> None:
        self.length = text[0].shape[1]
        self.k_BSND, self.v_BSND = (self._buffer(part, tokens) for part in text)

    @staticmethod
    def _buffer(text_BLND: Tensor, tokens: int) -> Tensor:
        B, L, N, D = text_BLND.shape
        buffer = text_BLND.new_zeros(B, L + tokens, N, D)
        buffer[:, :L] = text_BLND
        return buffer

    def write(self, slots_R: Tensor, k_BRND: Tensor, v_BRND: Tensor) -> None:
        self.k_BSND[:, self.length + slots_R] = k_BRND
        self.v_BSND[:, self.length + slots_R] = v_BRND


class Decoder:
    """Incremental forward pass of a batch through one stage.

    Args:
        model: In eval mode; weights of any dtype.
        stage: Layout and attention-plus; `base` has one frame.
        text_BL: int64 text pieces, padded on the left.
        text_valid_BL: bool, False on padding.
        plus: False runs the base channel only.

    The text runs through the model at construction. For guidance, put both texts into one batch.
    """

    @torch.no_grad()
    def __init__(
        self, model: CogVideo, stage: Stage, text_BL: Tensor, text_valid_BL: Tensor, plus: bool = True
    ) -> None:
        self.model = model
        self.layout = stage_layout(model.config, stage)
        self.plus = model.plus_of(stage)
        self.plus_layers = list(self.plus.layers) if self.plus is not None and plus else [None] * len(model.layers)
        self.valid_BL = text_valid_BL
        self.all_text_valid = bool(text_valid_BL.all())
        tokens = self.layout.grid.tokens
        self.base_mask = self.layout.base_mask
        self.plus_masks: list[MaskSpec] = []
        self.base: list[_Channel] = []
        self.plus_channels: list[_Channel | None] = []
        rows_BLC = model.embed_text(text_BL, text_valid_BL)
        for index, (layer, plus_layer) in enumerate(zip(model.layers, self.plus_layers, strict=True)):
            rows_BLC, states = layer.text_rows(rows_BLC, text_valid_BL, plus_layer)
            self.base.append(_Channel(states.base, tokens))
            self.plus_channels.append(_Channel(states.plus, tokens) if states.plus is not None else None)
            if plus_layer is not None:
                self.plus_masks.append(self.layout.plus_mask(model.space(stage), index))

    @torch.no_grad()
    def give(self, frames: Mapping[int, Tensor]) -> None:
        """Write known frames {frame: codes [B, P] int64} into the caches.

        Frames of one level that are open see each other, so they must be given in one call.
        """
        levels = sorted({self.layout.order.level[frame] for frame in frames})
        for level in levels:
            peers = [frame for frame in sorted(frames) if self.layout.order.level[frame] == level]
            self._run([self._frame_inputs(frame, frames[frame]) for frame in peers], peers)

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
        hidden_B1C = self._rows(rows_B1C, (frame * self.layout.grid.cells + cell,))
        return self.model.code_logits(hidden_B1C)[:, 0]

    def frame_logits(self, frame: int, codes_BP: Tensor) -> Tensor:
        """fp32 logits [B, P, V] of a whole frame whose codes are known, written into the caches."""
        with torch.no_grad():
            return self.model.code_logits(self._run([self._frame_inputs(frame, codes_BP)], [frame]))

    def _frame_inputs(self, frame: int, codes_BP: Tensor) -> Tensor:
        boi_B1C = self.model.embed_boi(codes_BP.shape[0])
        inputs_BPC = torch.cat([boi_B1C, self.model.code_embedding(codes_BP[:, :-1])], dim=1)
        return self.model.embed_frame(inputs_BPC, frame, slice(None), self.plus)

    def _run(self, rows: list[Tensor], frames: list[int]) -> Tensor:
        P = self.layout.grid.cells
        tokens = tuple(frame * P + cell for frame in frames for cell in range(P))
        return self._rows(torch.cat(rows, dim=1), tokens)

    def _rows(self, rows_BRC: Tensor, tokens: tuple[int, ...]) -> Tensor:
        slots_R = torch.tensor(tokens, device=rows_BRC.device)
        for index, layer in enumerate(self.model.layers):
            plus_channel = self.plus_channels[index]
            plus_attend = None
            if plus_channel is not None:
                plus_attend = self._attend(plus_channel, self.plus_masks[index], tokens, slots_R)
            base_attend = self._attend(self.base[index], self.base_mask, tokens, slots_R)
            rows_BRC = layer.frame_rows(rows_BRC, base_attend, self.plus_layers[index], plus_attend)
        return rows_BRC

    def _attend(self, channel: _Channel, mask: MaskSpec, tokens: tuple[int, ...], slots_R: Tensor) -> Attend:
        keys_K, allowed_RK = key_list(mask, self.layout.grid, tokens, slots_R.device)
        L = channel.length
        gather = torch.cat([torch.arange(L, device=keys_K.device), L + keys_K])
        allowed_BRK = self._allowed(allowed_RK, len(tokens), len(keys_K))

        def attend(q_BRND: Tensor, k_BRND: Tensor, v_BRND: Tensor) -> Tensor:
            channel.write(slots_R, k_BRND, v_BRND)
            return cached_attention(q_BRND, channel.k_BSND[:, gather], channel.v_BSND[:, gather], allowed_BRK)

        return attend

    def _allowed(self, allowed_RK: Tensor | None, rows: int, keys: int) -> Tensor | None:
        if allowed_RK is None and self.all_text_valid:
            return None
        B, L = self.valid_BL.shape
        text_BRL = self.valid_BL[:, None, :].expand(B, rows, L)
        if allowed_RK is None:
            allowed_RK = torch.ones(rows, keys, dtype=torch.bool, device=self.valid_BL.device)
        return torch.cat([text_BRL, allowed_RK[None].expand(B, rows, keys)], dim=2)
