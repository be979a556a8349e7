"""Attention over text + video grids."""

from megacog_kernels.attention.dispatch import Implementation
from megacog_kernels.attention.ops import AttentionOutput, attention, decode_attention, text_attention

__all__ = ["AttentionOutput", "Implementation", "attention", "decode_attention", "text_attention"]
