"""Layernorms of a Sandwich-LN layer, with the residual sum between them."""

from megacog_kernels.norm.ops import layer_norm, residual_norm, sandwich_norm

__all__ = ["layer_norm", "residual_norm", "sandwich_norm"]
