"""Small models and inputs for the tests of model, generation and training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megacog.config.schema import Checkpointing, Kernels, ModelConfig, PlusStage
from megacog.model.init import initialize_base, initialize_plus
from megacog.model.transformer import CogVideo
from megacog.parallel.sequence import SequenceParallel
from megacog.parallel.tensor import TensorParallel

BOTH: tuple[PlusStage, ...] = ("sequential", "interpolation")


def model_config(**changes: Any) -> ModelConfig:
    """Two layers, width 32, grid 3 x 4: every dimension differs from the others."""
    settings: dict[str, Any] = dict(
        num_layers=2, hidden_size=32, num_heads=4, grid=(3, 4), text_length=6, text_positions=9,
        image_vocab_size=17, text_vocab_size=11, boi_id=10,
        attention={"interpolation": {"kind": "shifted_window", "window": (2, 2)}},
    )  # fmt: skip
    return ModelConfig.model_validate(settings | changes)


def build_model(
    config: ModelConfig | None = None,
    plus: Sequence[PlusStage] = BOTH,
    parallel: TensorParallel | None = None,
    noise: float = 0.3,
    kernels: Kernels = "auto",
    sequence: SequenceParallel | None = None,
    checkpointing: Checkpointing = "none",
) -> CogVideo:
    """A model with weights large enough that every part matters; the same for every number of ranks."""
    config = config or model_config()
    model = CogVideo(config, plus, parallel, checkpointing, kernels, sequence)
    initialize_base(model, seed=1)
    whole = CogVideo(config, plus)
    with torch.no_grad():
        shapes = dict(whole.named_parameters())
        for stage in plus:
            initialize_plus(model, stage, "copy", seed=1)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(index)
            extra = noise * torch.randn(shapes[name].shape, generator=generator)
            shard = getattr(parameter, "shard", None)
            parameter += shard.slice(extra, model.parallel.rank, model.parallel.size) if shard else extra
    return model


def batch(config: ModelConfig, frames: int, size: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Text [B, L], its validity (padding on the left of sample 0) and codes [B, T, P]."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, config.text_vocab_size, (size, config.text_length), generator=generator)
    valid = torch.ones_like(text, dtype=torch.bool)
    valid[0, : config.text_length // 2] = False
    codes = torch.randint(0, config.image_vocab_size, (size, frames, config.cells), generator=generator)
    return text, valid, codes
