"""Operators over text + video grids. Knows tensors and grids, never megacog."""

__version__ = "0.1.0"
