"""Tile sizes and warps of the attention kernels.

Chosen from ahead-of-time compiles (docs/kernels.md): no spills in bf16 and fp16, and registers and
shared memory for `resident` programs per multiprocessor. Several of them, or several warpgroups, are what
lets one's exponentials run beside another's matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megacog_kernels.attention.layout import positions
from megacog_kernels.grid import MaskSpec
from megacog_kernels.launch import max_registers


@dataclass(frozen=True)
class Configuration:
    """How one kernel is cut and compiled."""

    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int
    resident: int
    """Programs that fit on one multiprocessor at once: a limit on registers."""

    @property
    def max_registers(self) -> int:
        """Registers of one thread."""
        return max_registers(self.num_warps, self.resident)

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}


@dataclass(frozen=True)
class Configurations:
    """The three kernels of one op."""

    forward: Configuration
    query: Configuration
    """Gradient of q."""
    key: Configuration
    """Gradients of k and v."""


_SPARSE_64 = Configurations(
    forward=Configuration(64, 64, 4, 2, resident=3),
    query=Configuration(64, 64, 4, 2, resident=3),
    key=Configuration(64, 64, 4, 2, resident=2),
)
_DENSE_64 = Configurations(
    forward=Configuration(128, 64, 8, 3, resident=2),
    query=Configuration(64, 64, 4, 2, resident=3),
    key=Configuration(64, 128, 8, 2, resident=1),
)
_BOTH_128 = Configurations(
    forward=Configuration(128, 64, 8, 2, resident=1),
    query=Configuration(128, 64, 8, 2, resident=1),
    key=Configuration(32, 128, 8, 2, resident=1),
)
# Without wgmma, operands pass through registers: smaller tiles, and fewer resident programs.
_AMPERE_64 = Configurations(
    forward=Configuration(64, 64, 4, 2, resident=3),
    query=Configuration(64, 64, 4, 2, resident=2),
    key=Configuration(32, 64, 4, 2, resident=2),
)
_AMPERE_128 = Configurations(
    forward=Configuration(128, 64, 8, 2, resident=1),
    query=Configuration(64, 32, 4, 2, resident=2),
    key=Configuration(32, 64, 8, 2, resident=1),
)
# Triton 3.9 keeps more of the forward pass in registers on Blackwell.
_BLACKWELL_64 = Configurations(
    forward=Configuration(64, 64, 4, 2, resident=2),
    query=Configuration(64, 64, 4, 2, resident=2),
    key=Configuration(32, 64, 4, 2, resident=2),
)
_FLOAT32 = Configurations(*[Configuration(32, 32, 4, 1, resident=1)] * 3)


def is_dense(mask: MaskSpec) -> bool:
    """Full space in an order that needs one interval of keys: nearly all pairs of tiles are full."""
    return mask.space.kind == "full" and positions(mask.order).simple


def configurations(head_dim: int, dtype: torch.dtype, dense: bool, capability: int) -> Configurations:
    """What a call with this head dim and dtype uses.

    Args:
        head_dim, dtype: Of q.
        dense: See `is_dense`. Sparse masks take smaller query tiles, because fewer of their pairs are
            wasted.
        capability: Major compute capability of the device.
    """
    if dtype == torch.float32:
        return _FLOAT32
    if capability < 9 or capability > 11:  # 12 has neither wgmma nor the shared memory of its namesakes
        return _AMPERE_128 if head_dim == 128 else _AMPERE_64
    if head_dim == 128:
        return _BOTH_128
    if capability > 9:
        return _BLACKWELL_64
    return _DENSE_64 if dense else _SPARSE_64
