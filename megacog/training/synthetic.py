"""A training step without data: weights drawn where they are needed, samples of random codes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacog.checkpoint.export import Export
from megacog.config.schema import Config, ModelConfig, Stage
from megacog.data.batch import Batch
from megacog.model.init import whole_shape
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog.parallel.groups import ProcessGroups
from megacog.planning.plan import accumulation_steps
from megacog.training.engine import Engine, build_engine
from megacog.training.precision import DTYPES
from megacog.training.pretrain import build_model

SINGLE = ProcessGroups()
"""The place of a process that trains alone."""


@dataclass(frozen=True)
class RandomBase(Export):
    """A base of random weights that no file holds: each tensor is drawn on its device when asked for, by its name."""

    device: torch.device = torch.device("cpu")
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """As `megacog.model.init` starts a base: norms at 1, biases at 0, matrices and tables at random."""
        settings, dtype = self.model.init, DTYPES[self.config.train.precision]
        out = torch.zeros(self.shapes[name], dtype=dtype, device=self.device)
        if name.endswith("bias"):
            return out
        if "layernorm" in name:
            after_branch = "third_layernorm" in name or "fourth_layernorm" in name
            return out.fill_(settings.residual_norm if after_branch else 1.0)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        std = settings.embedding_std if "embedding" in name else settings.weight_std
        if name.endswith(("dense.weight", "down.weight")):
            std /= (2 * self.model.num_layers) ** 0.5
        return out.normal_(0.0, std, generator=torch.Generator(self.device).manual_seed(seed))

    def tensor_bytes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of the tensors as they are drawn."""
        size = DTYPES[self.config.train.precision].itemsize
        return {name: torch.Size(self.shapes[name]).numel() * size for name in names}


def random_base(config: Config, device: torch.device) -> RandomBase:
    """A base of the run's shape and precision."""
    with torch.device("meta"):
        model = CogVideo(config.model, ())
    shapes = {name: tuple(whole_shape(parameter, 1)) for name, parameter in model.named_parameters()}
    return RandomBase(
        path=Path("random weights"), config=config, files=dict.fromkeys(shapes, ""), tokenizers=(), steps={},
        fingerprint="random", device=device, shapes=shapes,
    )  # fmt: skip


def random_engine(config: Config, device: torch.device, groups: ProcessGroups = SINGLE) -> Engine:
    """The run's engine on this rank over random weights, ready to train. Collective."""
    export = random_base(config, device) if config.train.stage != "base" else None
    model, _, _ = build_model(config, groups, device, export, None)
    model.train()
    return build_engine(config, model, groups, accumulation_steps(config, groups.data_size))


def random_batch(model: ModelConfig, stage: Stage, samples: int, seed: int) -> Batch:
    """Samples of random codes under random texts without padding; the same for the same seed."""
    grid, generator = stage_layout(model, stage).grid, torch.Generator().manual_seed(seed)
    text_BL = torch.randint(0, model.text_vocab_size, (samples, model.text_length), generator=generator)
    codes = (samples, grid.frames, grid.cells)
    return Batch(
        text_BL=text_BL,
        text_valid_BL=torch.ones_like(text_BL, dtype=torch.bool),
        frames_BTP=torch.randint(0, model.image_vocab_size, codes, generator=generator),
        context_BTP=None,
        fps_B=torch.ones(samples),
        sample_ids=[f"random {seed}/{index}" for index in range(samples)],
    )


def random_inputs(config: Config, device: torch.device) -> dict[str, Any]:
    """The model's forward arguments for one micro batch of random samples."""
    batch = random_batch(config.model, config.train.stage, config.train.micro_batch_size, seed=0).to(device)
    return {
        "text_BL": batch.text_BL, "text_valid_BL": batch.text_valid_BL, "frames_BTP": batch.frames_BTP,
        "stage": config.train.stage,
    }  # fmt: skip


def batches(model: ModelConfig, stage: Stage, samples: int, distinct: int, start: int = 0) -> Iterator[Batch]:
    """Micro batches from number `start` on, which come around again after `distinct` of them."""
    kept = [random_batch(model, stage, samples, seed) for seed in range(distinct)]
    number = start
    while True:
        yield kept[number % distinct]
        number += 1
