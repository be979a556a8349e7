"""Work of one training sample, counted from the shapes and the masks.

A multiply-add is two operations. Linear layers are counted by the rows that a loss needs, attention by the keys
that the mask lets a query see, and gradients where something trained depends on them:

- frozen matrices take no weight gradient, and text rows of the video stages no gradient at all;
- text rows have no attention-plus queries, and the last layer needs no text rows but their keys and values;
- in the last layer, queries, output projections and MLP are needed for predicted rows only, keys and values for all;
- the head runs at predicted rows, over the image codes.

The model's work holds no recomputation: attention's backward pass counts twice its forward pass, though fused
kernels compute the scores again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from megacog.config.schema import Checkpointing, ModelConfig, Stage
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


def training_work(model: ModelConfig, stage: Stage, policy: Checkpointing = "none") -> Work:
    """Work of forward and backward for one sample of a stage.

    Args:
        model: Its shape and masks.
        stage: Which sequence, and what is trained.
        policy: `train.activation_checkpointing`: what is recomputed. Layers as a whole by `full`; by `selective`
            queries, keys, values and the MLP's first product.
    """
    layout = stage_layout(model, stage)
    head = 2 * model.hidden_size * model.image_vocab_size * len(layout.loss_frames) * layout.grid.cells
    total = Work(head=(3 if stage == "base" else 2) * head)
    for layer in range(model.num_layers):
        total += _layer_work(model, layout, layer, policy)
    return total


def _layer_work(model: ModelConfig, layout: StageLayout, layer: int, policy: Checkpointing) -> Work:
    """Forward and backward of one layer."""
    C, L, last = model.hidden_size, layout.text_length, layer == model.num_layers - 1
    frames = layout.loss_frames if last else tuple(range(layout.grid.frames))
    all_rows, rows, text_rows = layout.grid.tokens, len(frames) * layout.grid.cells, 0 if last else L
    """Rows that go on to the next layer, or to the head."""
    base, plus = _Channel(C, model.ffn), _Channel(C, 0)
    text_seen = 4 * C * rows * L
    """Frame queries and text keys of one channel."""
    text_attention, base_seen = 4 * C * text_rows * L, _seen(C, layout.base_mask, layout, frames)
    if layout.stage == "base":
        linear = base.forward(L, text_rows) + base.forward(rows, rows)
        attention = text_attention + base_seen + text_seen
        again = {"none": 0, "selective": base.again(L, text_rows) + base.again(rows, rows), "full": linear + attention}
        return Work(trained=3 * linear, attention=3 * attention, recomputed=again[policy])
    mask = layout.plus_mask(getattr(model.attention, layout.stage), layer)
    plus_seen = _seen(C, mask, layout, frames)
    plus_text = plus.forward(L, 0)
    base_frames, plus_frames = base.forward(all_rows, rows), plus.forward(all_rows, rows)
    again = {
        "none": 0,
        "selective": base.again(all_rows, rows) + plus.again(all_rows, rows) + plus_text,
        "full": base_frames + plus_frames + plus_text + base_seen + plus_seen + 2 * text_seen,
    }
    return Work(
        frozen=base.forward(L, text_rows) + 2 * base_frames,
        trained=2 * plus_text + 3 * plus_frames,  # no gradient of the text's rows
        attention=text_attention + 3 * base_seen + 2 * text_seen + 3 * (plus_seen + text_seen),
        recomputed=again[policy],
    )


@dataclass(frozen=True)
class _Channel:
    """Linear layers of a channel, and of the MLP behind it."""

    width: int
    ffn: int

    def forward(self, keys: int, rows: int) -> int:
        """Keys and values of some rows; queries, output projection and MLP of those that go on."""
        C = self.width
        return 4 * C * C * keys + (4 * C * C + 4 * C * self.ffn) * rows

    def again(self, keys: int, rows: int) -> int:
        """The same without the outputs that selective checkpointing keeps."""
        C = self.width
        return 4 * C * C * keys + (2 * C * C + 2 * C * self.ffn) * rows


def _seen(width: int, mask: MaskSpec, layout: StageLayout, frames: tuple[int, ...]) -> int:
    """Forward pass of attention between frame tokens, for the queries of some frames."""
    pairs = visible_pairs(mask, layout.grid)
    return 4 * width * sum(pairs[frame] for frame in frames)


def tokens_per_sample(model: ModelConfig, stage: Stage) -> int:
    """Text and frame tokens of one sample."""
    return model.text_length + stage_layout(model, stage).grid.tokens
