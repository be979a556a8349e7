"""The plan of a run on a cluster: memory per rank by activation policy, and what fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from megacog.config.schema import Checkpointing, Config
from megacog.errors import ConfigError
from megacog.model.transformer import CogVideo
from megacog.parallel.tensor import TensorParallel
from megacog.planning.memory import Elements, State, engine_state
from megacog.planning.trace import Pass, trace_pass

POLICIES: tuple[Checkpointing, ...] = get_args(Checkpointing)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank with one activation policy."""

    policy: Checkpointing
    micro_batch: int
    state: State
    one: Pass
    peak: float
    """Most bytes of tensors alive at once in a step."""


def count_elements(config: Config) -> Elements:
    """What the first tensor-parallel rank holds, from the model on the meta device."""
    stage, tensor = config.train.stage, config.parallel.tensor
    model_config = config.model.model_copy(update={"boi_id": config.model.boi_id or 0})
    with torch.device("meta"):
        model = CogVideo(model_config, () if stage == "base" else (stage,), TensorParallel(0, tensor))
    model.trainable(stage)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return Elements(sum(trained), frozen, max(trained), 2 if config.train.precision == "bf16" else 4)


def data_parallel(config: Config, world: int) -> int:
    """Ranks that take different samples.

    Raises:
        ConfigError: The world does not divide.
    """
    block = config.parallel.tensor
    if world % block:
        raise ConfigError(f"parallel.tensor = {block} does not divide the {world} ranks of this run; start a multiple")
    return world // block


def accumulation_steps(config: Config, data_size: int) -> int:
    """Micro batches per rank and step.

    Raises:
        ConfigError: The global batch does not divide over ranks and micro batches.
    """
    train, per_pass = config.train, config.train.micro_batch_size * data_size
    if train.global_batch_size % per_pass:
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {data_size} data-parallel ranks = {per_pass}"
        )
    return train.global_batch_size // per_pass


def plan_memory(config: Config, world: int, policy: Checkpointing, micro_batch: int, gpu: bool) -> Memory:
    """Peak memory of one rank of the run, with another policy and micro batch than its own."""
    data_size = data_parallel(config, world)
    accumulation = max(1, config.train.global_batch_size // (micro_batch * data_size))
    elements = count_elements(config)
    state = engine_state(config, elements, data_size, accumulation, gpu)
    one = trace_pass(config, policy, micro_batch, gpu)
    return Memory(policy, micro_batch, state, one, state.peak(one, elements.trained * elements.weight_bytes))
