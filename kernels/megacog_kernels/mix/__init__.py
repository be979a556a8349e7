"""The mix of the two attention channels."""

from megacog_kernels.mix.ops import mix

__all__ = ["mix"]
