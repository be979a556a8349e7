"""How a stage lays tokens out: text, then frames; what is given, what is predicted, what sees what.

The input at cell p of a frame is the code of cell p - 1 (the start-of-image token at cell 0), and the
row predicts the code of cell p: grid and positions are those of the predicted code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacog.config.schema import ModelConfig, SpaceConfig, Stage
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid


@dataclass(frozen=True)
class StageLayout:
    """Frames of one stage and their order."""

    stage: Stage
    grid: VideoGrid
    order: Order
    text_length: int
    loss_frames: tuple[int, ...]
    """Frames that are predicted and trained on."""

    @property
    def given_frames(self) -> tuple[int, ...]:
        """Frames that are known and not trained on."""
        return tuple(frame for frame in range(self.grid.frames) if frame not in self.loss_frames)

    def predicted_rows(self, x_BFC: Tensor) -> Tensor:
        """The rows of the predicted frames [B, predicted frames * P, C]; or of a rank's share of all frames."""
        step = 1 if len(self.loss_frames) == 1 else self.loss_frames[1] - self.loss_frames[0]
        frames = x_BFC.unflatten(1, (self.grid.frames, -1))
        return frames[:, self.loss_frames[0] : self.loss_frames[-1] + 1 : step].flatten(1, 2)

    @property
    def base_mask(self) -> MaskSpec:
        """The base channel sees its own frame only."""
        return MaskSpec(self.order, Space("frame"))

    def plus_mask(self, space: SpaceConfig, layer: int) -> MaskSpec:
        """The attention-plus mask of a layer; odd layers shift their windows by half a window."""
        return MaskSpec(self.order, layer_space(space, layer))


def layer_space(space: SpaceConfig, layer: int) -> Space:
    """The kernels' space of one layer: windows of odd layers begin at half a window, rounded down."""
    shift = (0, 0)
    if space.kind == "shifted_window" and layer % 2 and space.window:
        height, width = space.window
        shift = (height - height // 2, width - width // 2)
    return Space(space.kind, space.window, space.frames, shift)


def stage_layout(model: ModelConfig, stage: Stage) -> StageLayout:
    """The layout that a stage trains with."""
    frames = 1 if stage == "base" else model.num_frames
    first, step = (0 if stage == "base" else 1), (2 if stage == "interpolation" else 1)
    loss_frames = tuple(range(first, frames, step))
    order = Order.interpolation(frames) if stage == "interpolation" else Order.sequential(frames)
    return StageLayout(stage, VideoGrid(frames, *model.grid), order, model.text_length, loss_frames)


def text_position_ids(valid_BL: Tensor) -> Tensor:
    """Positions of left-padded text: 0 on padding, then 0, 1, 2, ... from the first real token: int64 [B, L]."""
    return (valid_BL.long().cumsum(dim=1) - 1).clamp_min(0)


def tiled_plus_positions(base_EC: Tensor, model: ModelConfig) -> Tensor:
    """A fresh additional position table: the base rows of frame 0 repeated: [plus_position_rows, C]."""
    frame_PC = base_EC[model.text_positions : model.text_positions + model.cells]
    repeats = -(-model.plus_position_rows // model.cells)
    return frame_PC.repeat(repeats, 1)[: model.plus_position_rows].clone(memory_format=torch.contiguous_format)
