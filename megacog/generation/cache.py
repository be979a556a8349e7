"""Key/value caches: frames given whole, then codes one at a time.

Keys and values of both channels stand in static buffers, one slot per frame token after those of the
text. A new row sees the text and the slots that the mask rule names (`megacog_kernels.grid.visible`), so
any order table and space works, and nothing here knows a stage's name. Slots follow the order in which
frames come to be known: what a row sees of the `full` and `frame` spaces is then one slice, read in
place; only windows are copied together.

Legend: B batch, L text length, P cells of a frame, F frame tokens, S slots (L + F), R new rows,
K visible keys, N heads of this rank, D head dim, C width, V image codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megacog.config.schema import Stage
from megacog.model.attention import Attend
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo, KeyValue
from megacog_kernels.attention import cached_attention
from megacog_kernels.grid import MaskSpec, VideoGrid, visible_keys

Slots = slice | Tensor
"""Places in a buffer: a slice where they adjoin (indexing gives a view), else int64 indices (a copy)."""


@dataclass(frozen=True)
class View:
    """Where new rows stand in the buffers of one mask, and what they see there."""

    rows: Slots
    keys: Slots
    """Slots that any of the rows sees, the text's first: K."""
    seen_RK: Tensor | None
    """Which of the keys each row sees; None = all of them."""


@lru_cache(maxsize=64)
def frame_places(mask: MaskSpec) -> tuple[int, ...]:
    """Place of every frame in the buffers: the order in which frames come to be known.

    Nobody else sees a frame of the `frame` space, so frames of different levels share places there.
    """
    level = mask.order.level
    if mask.space.kind == "frame":
        return tuple(level[:frame].count(level[frame]) for frame in range(len(level)))
    entry = sorted(range(len(level)), key=level.__getitem__)
    return tuple(entry.index(frame) for frame in range(len(level)))


@lru_cache(maxsize=8192)
def view(mask: MaskSpec, grid: VideoGrid, tokens: tuple[int, ...], text_length: int, device: torch.device) -> View:
    """The view of new rows; `tokens` are numbered frame * P + cell."""
    start_T = text_length + np.array(frame_places(mask)) * grid.cells
    slot_F = np.add.outer(start_T, np.arange(grid.cells)).ravel()
    tokens_K, seen_RK = visible_keys(mask, grid, tokens)
    ascending_K = slot_F[tokens_K].argsort()
    slot_K = np.concatenate([np.arange(text_length), slot_F[tokens_K][ascending_K]])
    rows, keys = _slots(slot_F[list(tokens)], device), _slots(slot_K, device)
    if seen_RK.all():
        return View(rows, keys, None)
    text_RL = np.ones((len(tokens), text_length), dtype=bool)
    return View(rows, keys, torch.from_numpy(np.hstack([text_RL, seen_RK[:, ascending_K]])).to(device))


def _slots(places: np.ndarray, device: torch.device) -> Slots:
    first, end = int(places[0]), int(places[0]) + len(places)
    if (places == np.arange(first, end)).all():
        return slice(first, end)
    return torch.from_numpy(places).to(device)


class _Channel:
    """Keys and values of one channel of one layer: text, then a slot per place and cell."""

    def __init__(self, text: KeyValue, mask: MaskSpec, cells: int) -> None:
        self.mask = mask
        B, L, N, D = text[0].shape
        slots = L + (max(frame_places(mask)) + 1) * cells
        # Heads before slots: the keys of a head lie together, which attention on a CPU reads twice as fast.
        self.kv_2BNSD = text[0].new_zeros(2, B, N, slots, D)
        self._write(slice(L), *text)

    def attend(self, view: View, allowed_BRK: Tensor | None) -> Attend:
        """Attention that first writes the new rows."""

        def attend(q_BRND: Tensor, k_BRND: Tensor, v_BRND: Tensor) -> Tensor:
            self._write(view.rows, k_BRND, v_BRND)
            k_BKND, v_BKND = self._read(view.keys).transpose(2, 3)
            return cached_attention(q_BRND, k_BKND, v_BKND, allowed_BRK)

        return attend

    def _write(self, slots: Slots, k_BRND: Tensor, v_BRND: Tensor) -> None:
        self.kv_2BNSD[0, :, :, slots] = k_BRND.transpose(1, 2)
        self.kv_2BNSD[1, :, :, slots] = v_BRND.transpose(1, 2)

    def _read(self, slots: Slots) -> Tensor:
        return self.kv_2BNSD[..., slots, :] if isinstance(slots, slice) else self.kv_2BNSD.index_select(3, slots)


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
        B, self.text_length = text_valid_BL.shape
        grid = self.layout.grid
        self.valid_BS = torch.cat([text_valid_BL, text_valid_BL.new_ones(B, grid.tokens)], dim=1)
        self.all_text_valid = bool(text_valid_BL.all())
        self.base: list[_Channel] = []
        self.plus_channels: list[_Channel | None] = []
        rows_BLC = model.embed_text(text_BL, text_valid_BL)
        for index, (layer, plus_layer) in enumerate(zip(model.layers, self.plus_layers, strict=True)):
            rows_BLC, states = layer.text_rows(rows_BLC, text_valid_BL, plus_layer)
            self.base.append(_Channel(states.base, self.layout.base_mask, grid.cells))
            channel = None
            if states.plus is not None:
                channel = _Channel(states.plus, self.layout.plus_mask(model.space(stage), index), grid.cells)
            self.plus_channels.append(channel)
        self.masks = {channel.mask for channel in (*self.base, *self.plus_channels) if channel is not None}

    @torch.no_grad()
    def give(self, frames: Mapping[int, Tensor]) -> None:
        """Write known frames {frame: codes [B, P] int64} into the caches.

        Frames of one level that are open see each other, so they must be given in one call.
        """
        levels = sorted({self.layout.order.level[frame] for frame in frames})
        for level in levels:
            peers = [frame for frame in sorted(frames) if self.layout.order.level[frame] == level]
            rows = [self._frame_inputs(frame, frames[frame]) for frame in peers]
            cells = range(self.layout.grid.cells)
            self._rows(torch.cat(rows, dim=1), tuple(frame * len(cells) + cell for frame in peers for cell in cells))

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
            inputs_B1C = self.model.embed_boi(self.valid_BS.shape[0])
        else:
            inputs_B1C = self.model.code_embedding(previous_B[:, None])
        rows_B1C = self.model.embed_frame(inputs_B1C, frame, slice(cell, cell + 1), self.plus)
        hidden_B1C = self._rows(rows_B1C, (frame * self.layout.grid.cells + cell,))
        return self.model.code_logits(hidden_B1C)[:, 0]

    def _frame_inputs(self, frame: int, codes_BP: Tensor) -> Tensor:
        boi_B1C = self.model.embed_boi(codes_BP.shape[0])
        inputs_BPC = torch.cat([boi_B1C, self.model.code_embedding(codes_BP[:, :-1])], dim=1)
        return self.model.embed_frame(inputs_BPC, frame, slice(None), self.plus)

    def _rows(self, rows_BRC: Tensor, tokens: tuple[int, ...]) -> Tensor:
        views = {mask: self._view(mask, tokens) for mask in self.masks}
        channels = zip(self.base, self.plus_channels, strict=True)
        for layer, plus_layer, (base, plus) in zip(self.model.layers, self.plus_layers, channels, strict=True):
            plus_attend = plus.attend(*views[plus.mask]) if plus is not None else None
            rows_BRC = layer.frame_rows(rows_BRC, base.attend(*views[base.mask]), plus_layer, plus_attend)
        return rows_BRC

    def _view(self, mask: MaskSpec, tokens: tuple[int, ...]) -> tuple[View, Tensor | None]:
        """What new rows see, and which of it each row of the batch: bool [B, R or 1, K], None = all."""
        seen = view(mask, self.layout.grid, tokens, self.text_length, self.valid_BS.device)
        if seen.seen_RK is None and self.all_text_valid:
            return seen, None
        allowed_B1K = self.valid_BS[:, None, seen.keys]
        return seen, allowed_B1K if seen.seen_RK is None else allowed_B1K & seen.seen_RK
