"""Attention over text + video grids."""

from megacog_kernels.attention.reference import cached_attention, text_attention, video_attention

__all__ = ["cached_attention", "text_attention", "video_attention"]
