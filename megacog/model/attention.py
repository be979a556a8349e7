"""The two attention channels of a layer.

Legend: B batch, R rows (text or frames), N heads of this rank, D head dim, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megacog.config.schema import ModelConfig
from megacog.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megacog.parallel.tensor import TensorParallel
from megacog_kernels.dispatch import Implementation
from megacog_kernels.mix import mix

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q, k, v rows [B, R, N, D] over whatever they see: [B, R, N, D]."""
KeyValue = tuple[Tensor, Tensor]
"""Keys and values [B, R, N, D]."""


Q, KV, QKV = (0, 1), (1, 3), (0, 3)
"""Blocks of the fused projection."""


class AttentionChannel(nn.Module):
    """Projections of one channel: fused q|k|v in thirds, and the output `dense`."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        C = config.hidden_size
        self.head_dim = config.head_dim
        self.qkv = ColumnParallelLinear(C, 3 * C, parallel, blocks=3)
        self.dense = RowParallelLinear(C, C, parallel)

    def project(self, x_BRC: Tensor) -> list[Tensor]:
        """q, k and v: each [B, R, N, D], strided views of one buffer."""
        return self._split(self.qkv(x_BRC), 3)

    def project_text(self, x_BLC: Tensor) -> KeyValue:
        """k and v of text rows that ask for nothing: each [B, L, N, D]."""
        (kv,) = self.qkv(x_BLC, ranges=[KV])
        k_BLND, v_BLND = self._split(kv, 2)
        return k_BLND, v_BLND

    def project_frames(self, x_BRC: Tensor, queries_BQC: Tensor | None, text_BLC: Tensor | None) -> list[Tensor]:
        """q, k and v of frame rows, then k and v of text rows, if given.

        Only `queries_BQC` are asked for, where it is given: rows of x_BRC.
        """
        if queries_BQC is None:
            inputs, ranges = [x_BRC], [QKV]
        else:
            inputs, ranges = [queries_BQC, x_BRC], [Q, KV]
        if text_BLC is not None:
            inputs, ranges = [*inputs, text_BLC], [*ranges, KV]
        parts = self.qkv(*inputs, ranges=ranges)
        return [
            piece for part, (first, end) in zip(parts, ranges, strict=True) for piece in self._split(part, end - first)
        ]

    def _split(self, x_BRC: Tensor, parts: int) -> list[Tensor]:
        return [part.unflatten(-1, (-1, self.head_dim)) for part in x_BRC.chunk(parts, dim=-1)]

    def forward(self, x_BRC: Tensor, attend: Attend) -> Tensor:
        """Project, attend, project back: [B, R, C]."""
        q, k, v = self.project(x_BRC)
        return self.back(attend(q, k, v))

    def back(self, x_BRND: Tensor) -> Tensor:
        """The heads' results, projected back: [B, R, C]."""
        out: Tensor = self.dense(x_BRND.flatten(-2))
        return out


class Gate(nn.Module):
    """Mixes the channels per hidden dimension: a * base + (1 - a) * plus, a = sigmoid(logit)."""

    def __init__(self, width: int, kernels: Implementation) -> None:
        super().__init__()
        self.kernels: Implementation = kernels
        self.logit = nn.Parameter(torch.empty(width))

    def forward(self, base_BRC: Tensor, plus_BRC: Tensor) -> Tensor:
        return mix(base_BRC, plus_BRC, self.logit, implementation=self.kernels)


class PlusLayer(AttentionChannel):
    """Attention-plus of one layer: a trainable channel and its gate."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel, kernels: Implementation) -> None:
        super().__init__(config, parallel)
        self.gate = Gate(config.hidden_size, kernels)


class AttentionPlus(nn.Module):
    """The trainable part of one stage: a channel per layer and positions of frames 1, 2, ..."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel, kernels: Implementation) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(config.plus_position_rows, config.hidden_size)
        layers = [PlusLayer(config, parallel, kernels) for _ in range(config.num_layers)]
        self.layers: Sequence[PlusLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
