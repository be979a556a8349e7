"""Work of one training sample, counted from the shapes and the masks.

A multiply-add is two operations. Linear layers are counted by the rows that a loss needs, attention by the keys
that the mask lets a query see, and gradients where something trained depends on them:

- frozen matrices take no weight gradient, and text rows of the video stages no gradient at all;
- text rows have no attention-plus queries, and the last layer needs no text rows but their keys and values;
- in the last layer, queries, output projections and MLP are needed for predicted rows only, keys and values for what these see;
- the head runs at predicted rows, over the image codes.

The model's work holds no recomputation: attention's backward pass counts twice its forward pass, though fused
kernels compute the scores again.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from megacog.config.schema import ModelConfig, Stage
from megacog.model.layout import StageLayout, stage_layout
from megacog_kernels.grid import MaskSpec, Order, VideoGrid, dense_mask


@dataclass(frozen=True)
class Work:
    """Floating-point operations of forward and backward."""

    frozen: int = 0
    """Linear layers that are not trained."""
    trained: int = 0
    """Linear layers that are trained."""
    attention: int = 0
    """Scores and sums of values, of both channels and of the text."""
    head: int = 0
    """Logits of the image codes."""
    recomputed: int = 0
    """What the backward pass computes again instead of keeping it."""

    @property
    def model(self) -> int:
        """What the step is about: the FLOPs of model FLOP utilization (MFU)."""
        return self.frozen + self.trained + self.attention + self.head

    @property
    def hardware(self) -> int:
        """What the device is asked for: those of hardware FLOP utilization (HFU)."""
        return self.model + self.recomputed

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@lru_cache(maxsize=1024)
def visible_pairs(mask: MaskSpec, grid: VideoGrid) -> tuple[int, ...]:
    """(query, key) pairs of frame tokens that the mask allows, by the query's frame.

    Nothing as large as the mask is built: frames, rows and columns decide one by one, and the rule is asked about
    each axis alone.
    """
    whole = MaskSpec(Order((0,), (True,)), mask.space)
    near = 1
    """Pairs of near cells of two frames."""
    for axis in (VideoGrid(1, grid.height, 1), VideoGrid(1, 1, grid.width)):
        near *= int(dense_mask(whole, axis).sum())
    later = (near - grid.cells) // 2
    """Those with the key behind the query."""
    seen_T = dense_mask(mask, VideoGrid(grid.frames, 1, 1)).sum(axis=1) * near
    return tuple(int(n) for n in np.where(mask.order.open, seen_T, seen_T - later))


def training_work(model: ModelConfig, stage: Stage) -> Work:
    """Work of forward and backward for one sample of a stage."""
    layout = stage_layout(model, stage)
    head = 2 * model.hidden_size * model.image_vocab_size * len(layout.loss_frames) * layout.grid.cells
    total = Work(head=(3 if stage == "base" else 2) * head)
    for layer in range(model.num_layers):
        total += _layer_work(model, layout, layer)
    return total


def _layer_work(model: ModelConfig, layout: StageLayout, layer: int) -> Work:
    """Forward and backward of one layer."""
    C, L, video = model.hidden_size, layout.text_length, layout.stage != "base"
    last = layer == model.num_layers - 1
    matrix = 2 * C * C
    """One C x C matrix on one row."""
    forth = 2 * matrix + 4 * C * model.ffn
    """Queries, output projection and MLP."""
    frames = range(layout.grid.frames) if not last else layout.loss_frames
    rows = len(frames) * layout.grid.cells
    text = 4 * C * L * L if not last else 0
    base_text = 2 * matrix * L + (forth * L if not last else 0)
    base_frames = (2 * matrix + forth) * rows
    base_seen = 4 * C * sum(visible_pairs(layout.base_mask, layout.grid)[frame] for frame in frames)
    text_seen = 4 * C * rows * L
    """Frame queries and text keys of one channel."""
    if not video:
        return Work(trained=3 * (base_text + base_frames), attention=3 * (text + base_seen + text_seen))
    mask = layout.plus_mask(getattr(model.attention, layout.stage), layer)
    plus_seen = 4 * C * sum(visible_pairs(mask, layout.grid)[frame] for frame in frames)
    plus_keys = _seen_frames(mask, layout.grid.frames, tuple(frames)) * layout.grid.cells
    plus = 2 * matrix * (plus_keys + rows)
    return Work(
        frozen=base_text + 2 * base_frames,
        trained=2 * (2 * matrix * L) + 3 * plus,  # keys and values of the text: no gradient of their input
        attention=text + 3 * base_seen + 2 * text_seen + 3 * (plus_seen + text_seen),
    )


def _seen_frames(mask: MaskSpec, frames: int, queries: tuple[int, ...]) -> int:
    """How many frames some query frame sees."""
    return int(dense_mask(mask, VideoGrid(frames, 1, 1))[list(queries)].any(axis=0).sum())


def tokens_per_sample(model: ModelConfig, stage: Stage) -> int:
    """Text and frame tokens of one sample."""
    return model.text_length + stage_layout(model, stage).grid.tokens
