"""Attention over text + video grids."""

from megacog_kernels.attention.ops import AttentionOutput, attention, decode_attention, text_attention
from megacog_kernels.dispatch import Implementation

__all__ = ["AttentionOutput", "Implementation", "attention", "decode_attention", "text_attention"]
