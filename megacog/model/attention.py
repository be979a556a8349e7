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


class AttentionChannel(nn.Module):
    """Projections of one channel: fused q|k|v in thirds, and the output `dense`."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        C = config.hidden_size
        self.head_dim = config.head_dim
        self.qkv = ColumnParallelLinear(C, 3 * C, parallel, blocks=3)
        self.dense = RowParallelLinear(C, C, parallel)

    def project(self, x_BRC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v: each [B, R, N, D], strided views of one buffer."""
        q, k, v = self.qkv(x_BRC).chunk(3, dim=-1)
        heads = (-1, self.head_dim)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)

    def forward(self, x_BRC: Tensor, attend: Attend) -> Tensor:
        """Project, attend, project back: [B, R, C]."""
        return self.dense(attend(*self.project(x_BRC)).flatten(-2))


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

    def text_states(self, text_BLC: Tensor) -> KeyValue:
        """What frame rows see of the text in this channel."""
        _, k_BLND, v_BLND = self.project(text_BLC)
        return k_BLND, v_BLND


class AttentionPlus(nn.Module):
    """The trainable part of one stage: a channel per layer and positions of frames 1, 2, ..."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel, kernels: Implementation) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(config.plus_position_rows, config.hidden_size)
        layers = [PlusLayer(config, parallel, kernels) for _ in range(config.num_layers)]
        self.layers: Sequence[PlusLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
