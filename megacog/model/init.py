"""Initial weights: random for a base from scratch, copied for a fresh attention-plus.

Random tensors are drawn whole, by name, and then cut: every tensor-parallel size starts the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from megacog.config.schema import PlusStage
from megacog.model.layout import tiled_plus_positions
from megacog.model.transformer import CogVideo

PLUS_DENSE_STD = 0.02
"""Standard deviation of a random attention-plus `dense`, unscaled (facts of the release)."""


def whole_shape(parameter: Tensor, size: int) -> list[int]:
    """Shape of the whole tensor that `size` tensor-parallel ranks hold parts of."""
    shape = list(parameter.shape)
    shard = getattr(parameter, "shard", None)
    if shard is not None and size >= 1:
        shape[shard.dim] = shard.length
    return shape


@torch.no_grad()
def initialize_base(model: CogVideo, seed: int) -> None:
    """Draw the base as `model.init` says; biases 0."""
    init = model.config.init
    for name, parameter in model.named_parameters():
        if name.startswith("plus."):
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif "layernorm" in name:
            adds_to_residual = "third_layernorm" in name or "fourth_layernorm" in name
            parameter.fill_(init.residual_norm if adds_to_residual else 1.0)
        elif "embedding" in name:
            _draw(model, name, parameter, init.embedding_std, seed)
        else:
            output = name.endswith(("dense.weight", "down.weight"))
            std = init.weight_std / math.sqrt(2 * model.config.num_layers) if output else init.weight_std
            _draw(model, name, parameter, std, seed)


@torch.no_grad()
def initialize_plus(
    model: CogVideo,
    stage: PlusStage,
    dense: Literal["copy", "random"],
    seed: int,
    base: Callable[[str], Tensor] | None = None,
) -> None:
    """Start a stage's attention-plus from the base channel: qkv copied, dense copied or N(0, 0.02),
    positions tiled from the base's frame 0, gates half open.

    Args:
        base: This rank's part of a base parameter by name; None = as the model holds it.
    """
    base = base or model.get_parameter
    plus = model.plus_of(stage)
    assert plus is not None
    plus.position_embedding.weight.copy_(tiled_plus_positions(model.position_embedding.weight, model.config))
    for index, plus_layer in enumerate(plus.layers):
        copied = {"qkv": plus_layer.qkv, "dense": plus_layer.dense} if dense == "copy" else {"qkv": plus_layer.qkv}
        for module, linear in copied.items():
            for leaf, parameter in linear.named_parameters():
                parameter.copy_(base(f"layers.{index}.attention.{module}.{leaf}"))
        plus_layer.gate.logit.zero_()
        if dense == "random":
            plus_layer.dense.bias.zero_()
            _draw(model, f"plus.{stage}.layers.{index}.dense.weight", plus_layer.dense.weight, PLUS_DENSE_STD, seed)


def _draw(model: CogVideo, name: str, parameter: Tensor, std: float, seed: int) -> None:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    whole = torch.empty(whole_shape(parameter, model.parallel.size)).normal_(0.0, std, generator=generator)
    shard = getattr(parameter, "shard", None)
    part = shard.slice(whole, model.parallel.rank, model.parallel.size) if shard else whole
    parameter.copy_(part)
