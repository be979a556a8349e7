"""Work of one training sample, counted from the shapes and the masks.

A multiply-add is two operations. Attention is counted by the keys that the mask lets a query see.
Recomputation is not counted: this is the model's work, what MFU is about.
"""

from __future__ import annotations

from megacog.config.schema import ModelConfig, Stage
from megacog.model.layout import stage_layout
from megacog_kernels.grid import MaskSpec, VideoGrid, dense_mask


def visible_pairs(mask: MaskSpec, grid: VideoGrid) -> int:
    """(query, key) pairs of frame tokens that the mask allows."""
    return int(dense_mask(mask, grid).sum())


def training_flops(model: ModelConfig, stage: Stage) -> int:
    """Floating-point operations of forward and backward for one sample of a stage.

    Frozen matrices take no weight gradient; the text stream takes no gradient in the video stages;
    the head runs at predicted frames over the image codes only.
    """
    layout = stage_layout(model, stage)
    C, F, L = model.hidden_size, layout.grid.tokens, model.text_length
    channel = 4 * C * C
    base = channel + 2 * C * model.ffn
    head = 2 * C * model.image_vocab_size * len(layout.loss_frames) * layout.grid.cells
    base_pairs = visible_pairs(layout.base_mask, layout.grid) + F * L
    base_attention = 4 * C * base_pairs
    text = 2 * base * L + 4 * C * L * L
    frames = 2 * base * F + base_attention
    if stage == "base":  # input and weight gradients everywhere; attention backward is twice its forward
        return model.num_layers * 3 * (text + frames) + 3 * head
    total = 2 * head
    for layer in range(model.num_layers):
        mask = layout.plus_mask(getattr(model.attention, stage), layer)
        plus_attention = 4 * C * (visible_pairs(mask, layout.grid) + F * L)
        plus = 2 * channel * F + 2 * (2 * C * C) * L
        total += text + 2 * 2 * base * F + 3 * base_attention + 3 * plus + 3 * plus_attention
    return total


def tokens_per_sample(model: ModelConfig, stage: Stage) -> int:
    """Text and frame tokens of one sample."""
    return model.text_length + stage_layout(model, stage).grid.tokens
