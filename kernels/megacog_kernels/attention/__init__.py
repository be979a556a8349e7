"""Attention over text + video grids."""

from megacog_kernels.attention.ops import AttentionOutput, attention, decode_attention
from megacog_kernels.attention.reference import cached_attention, text_attention, video_attention

__all__ = [
    "AttentionOutput",
    "attention",
    "cached_attention",
    "decode_attention",
    "text_attention",
    "video_attention",
]
