"""Vectors to discrete codes and back: finite scalar quantization and EMA vector quantization.

Both take the encoder's output and give quantized vectors with a straight-through gradient.
FSQ (Mentzer et al. 2023) rounds each of a few bounded channels to a fixed number of levels: no
codebook to learn, no dead codes. EMA-VQ (van den Oord et al. 2017; Razavi et al. 2019) is the
nearest row of a learned codebook, as the inherited tokenizers have it.

Dimensions: B batch, D code channels, h/w code grid, M = B*h*w vectors, K codebook rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows x codebook of one block of distances; bounds memory for large codebooks.
_DISTANCE_BLOCK = 1 << 24


class Quantized(NamedTuple):
    """What a quantizer makes of the encoder's output."""

    vectors_BDhw: Tensor
    """Quantized, with the gradient passed straight through to the encoder."""
    codes_Bhw: Tensor
    """int64 in 0..K-1."""
    commitment: Tensor
    """Scalar loss that keeps the encoder near the codes; zero for FSQ."""


class FSQ(nn.Module):
    """Finite scalar quantization: channel d takes one of `levels[d]` values evenly spread in -1..1.

    A code is the mixed-radix number of its channels' levels, the first channel counting fastest.
    """

    _levels_D: Tensor
    _basis_D: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ levels {list(levels)} must each be at least 2")
        self.levels = tuple(levels)
        self.dim = len(levels)
        self.codebook_size = math.prod(levels)
        basis = [math.prod(levels[:channel]) for channel in range(self.dim)]
        # Constants, not weights: derived from `levels`, so not part of the state dict.
        self.register_buffer("_levels_D", torch.tensor(levels, dtype=torch.int64), persistent=False)
        self.register_buffer("_basis_D", torch.tensor(basis, dtype=torch.int64), persistent=False)

    def forward(self, z_BDhw: Tensor) -> Quantized:
        """Returns the nearest grid point of every vector."""
        z_BhwD = z_BDhw.movedim(1, -1)
        bounded = self._bound(z_BhwD)
        rounded = bounded.round()
        half_D = self._levels_D // 2
        vectors = (bounded + (rounded - bounded).detach()) / half_D
        codes = self.codes_of_levels(rounded.detach().to(torch.int64) + half_D)
        return Quantized(vectors.movedim(-1, 1), codes, z_BDhw.new_zeros(()))

    def vectors(self, codes_Bhw: Tensor) -> Tensor:
        """Returns float32 [B, D, h, w] of int64 codes."""
        half_D = self._levels_D // 2
        levels = self.levels_of_codes(codes_Bhw)
        return ((levels - half_D).float() / half_D).movedim(-1, 1)

    def codes_of_levels(self, levels: Tensor) -> Tensor:
        """Returns codes [...] of channel levels [..., D], level d in 0..levels[d]-1."""
        return (levels * self._basis_D).sum(-1)

    def levels_of_codes(self, codes: Tensor) -> Tensor:
        """Returns channel levels [..., D] of codes [...]; the inverse of `codes_of_levels`."""
        return codes.unsqueeze(-1) // self._basis_D % self._levels_D

    def update(self, z_BDhw: Tensor, codes_Bhw: Tensor, generator: torch.Generator) -> None:
        """Does nothing: there is no codebook to learn."""

    def _bound(self, z_BhwD: Tensor) -> Tensor:
        """Returns z squashed so that rounding gives exactly `levels` integers around zero."""
        levels_D = self._levels_D.to(z_BhwD.dtype)
        # A little wider than the outermost levels, so that they are reached well before saturation.
        half_D = (levels_D - 1) * (1 + 1e-3) / 2
        offset_D = torch.where(self._levels_D % 2 == 0, 0.5, 0.0).to(z_BhwD.dtype)
        shift_D = torch.atanh(offset_D / half_D)
        return torch.tanh(z_BhwD + shift_D) * half_D - offset_D


class EMAVQ(nn.Module):
    """Nearest codebook row; rows follow the mean of the vectors they win (no gradient).

    Rows that win almost nothing are restarted at vectors of the current batch, which also places
    the whole codebook at the first update.
    """

    embedding_KD: Tensor
    embedding_sum_KD: Tensor
    cluster_size_K: Tensor

    def __init__(
        self, codebook_size: int, dim: int, decay: float = 0.97, beta: float = 0.25, dead_share: float = 0.03
    ) -> None:
        """Makes an empty codebook.

        Args:
            codebook_size: K.
            dim: D.
            decay: of the moving averages, per update.
            beta: weight of the commitment loss.
            dead_share: rows that win less than this share of the average are restarted.
        """
        super().__init__()
        if codebook_size < 2 or dim < 1:
            raise ValueError(f"EMA-VQ needs codebook_size >= 2 and dim >= 1, not {codebook_size} and {dim}")
        self.codebook_size, self.dim = codebook_size, dim
        self.decay, self.beta, self.dead_share = decay, beta, dead_share
        self.register_buffer("embedding_KD", torch.zeros(codebook_size, dim))
        self.register_buffer("embedding_sum_KD", torch.zeros(codebook_size, dim))
        self.register_buffer("cluster_size_K", torch.zeros(codebook_size))

    def forward(self, z_BDhw: Tensor) -> Quantized:
        """Returns the nearest codebook row of every vector, and the commitment loss."""
        codes = self._nearest(z_BDhw.detach())
        vectors = self.vectors(codes)
        commitment = self.beta * F.mse_loss(z_BDhw, vectors)
        return Quantized(z_BDhw + (vectors - z_BDhw).detach(), codes, commitment)

    def vectors(self, codes_Bhw: Tensor) -> Tensor:
        """Returns float32 [B, D, h, w] of int64 codes."""
        return F.embedding(codes_Bhw, self.embedding_KD).movedim(-1, 1)

    @torch.no_grad()
    def update(self, z_BDhw: Tensor, codes_Bhw: Tensor, generator: torch.Generator) -> None:
        """Moves the codebook toward the vectors of one training batch; call once per step."""
        z_MD = z_BDhw.detach().movedim(1, -1).reshape(-1, self.dim)
        codes_M = codes_Bhw.reshape(-1)
        counts_K = torch.bincount(codes_M, minlength=self.codebook_size).to(z_MD.dtype)
        sums_KD = torch.zeros_like(self.embedding_sum_KD).index_add_(0, codes_M, z_MD)
        self.cluster_size_K.lerp_(counts_K, 1 - self.decay)
        self.embedding_sum_KD.lerp_(sums_KD, 1 - self.decay)
        self._restart_dead_rows(z_MD, generator)
        self.embedding_KD.copy_(self.embedding_sum_KD / self.cluster_size_K.clamp(min=1e-6)[:, None])

    def _restart_dead_rows(self, z_MD: Tensor, generator: torch.Generator) -> None:
        average = len(z_MD) / self.codebook_size
        dead = torch.nonzero(self.cluster_size_K < self.dead_share * average).flatten()
        if not len(dead):
            return
        chosen = torch.randint(len(z_MD), (len(dead),), generator=generator, device="cpu").to(z_MD.device)
        self.cluster_size_K[dead] = average
        self.embedding_sum_KD[dead] = z_MD[chosen] * average

    def _nearest(self, z_BDhw: Tensor) -> Tensor:
        z_BhwD = z_BDhw.movedim(1, -1)
        return nearest_rows(z_BhwD.reshape(-1, self.dim), self.embedding_KD).view(z_BhwD.shape[:-1])


def nearest_rows(z_MD: Tensor, embedding_KD: Tensor) -> Tensor:
    """Returns for every vector the row of the codebook at the smallest Euclidean distance, int64 [M]."""
    norms_K = embedding_KD.square().sum(-1)
    rows = max(1, _DISTANCE_BLOCK // len(embedding_KD))
    blocks = [torch.argmin(norms_K - 2 * (block_MD @ embedding_KD.T), dim=-1) for block_MD in z_MD.split(rows)]
    return torch.cat(blocks)
