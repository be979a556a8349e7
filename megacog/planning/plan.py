"""The plan of a run on a cluster: what every rank holds, what fits, how fast it goes, and what to change.

`plan` is the whole of it. Memory is computed from shapes and is the same on every rank; times are predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, get_args

import torch
from pydantic import BaseModel, ConfigDict

from megacog.config.schema import Checkpointing, Config
from megacog.errors import ConfigError
from megacog.model.flops import tokens_per_sample, training_work
from megacog.model.transformer import CogVideo
from megacog.parallel.fp8 import hold_in_fp8
from megacog.parallel.tensor import TensorParallel
from megacog.planning.cluster import Cluster, Device
from megacog.planning.memory import Elements, Phase, engine_state, host_bytes, tree
from megacog.planning.speed import StepTime, step_time
from megacog.planning.trace import Pass, trace_pass

POLICIES: tuple[Checkpointing, ...] = get_args(Checkpointing)
_LARGEST_TRIED = 4096
"""Samples; a micro batch beyond it is not looked for."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PolicyPlan(_Facts):
    """One activation policy at the run's micro batch. Bytes of one rank."""

    policy: Checkpointing
    activations: float
    """What the forward pass of a micro batch leaves for the backward pass."""
    peak: float
    """Most bytes of tensors alive at once in a step."""
    peak_when: str
    """The phase of the step in which they are."""
    peak_parts: dict[str, float]
    """What they are in sum: state of the engine, activations, and more of that phase."""
    fits: bool
    largest_micro_batch: int
    """That fits in memory, whatever divides; 0 = none."""


class Plan(_Facts):
    """A run on a cluster. Bytes of one rank, unless it says otherwise; times are predicted."""

    world: int
    data_size: int
    """Ranks that take different samples."""
    accumulation: int
    """Micro batches of one rank per step."""
    trained: int
    """Elements on one rank before ZeRO cuts them."""
    frozen: int
    state: dict[str, float]
    """By what it is for: weights, masters, moments, gradients, buckets, and what phases of a step need besides."""
    gradient_bytes: float
    """One gradient per trained weight, as autograd makes them."""
    host: float
    """For the optimizer, in the memory of each node."""
    policy: Checkpointing
    """Of the run."""
    policies: dict[Checkpointing, PolicyPlan]
    usable: float
    """Memory that tensors may take."""
    seconds: float | None
    """Of one step; None for a device whose peak is not known."""
    parts: dict[str, float] | None
    """Seconds of a step by what they are spent on."""
    sent: float | None
    """By one rank per step."""
    tokens_per_second: float | None
    """Of all ranks together."""
    model_tflops: float | None
    """Of one device: work without recomputation."""
    days: float | None
    """For train.steps."""
    gpu_hours: float | None
    checkpoint: float
    """On disk, in all."""
    frozen_checkpoint: float
    """On disk, once per run."""
    suggestions: list[str]
    """Overrides that fit, the fastest first; empty if the run fits as it is."""

    @property
    def peak(self) -> float:
        """Of the run's own policy."""
        return self.policies[self.policy].peak

    @property
    def fits(self) -> bool:
        return self.policies[self.policy].fits


@lru_cache(maxsize=64)
def _count(model: Any, stage: Any, tensor: int, weight_bytes: int, fp8: bool) -> Elements:
    with torch.device("meta"):
        built = CogVideo(model, () if stage == "base" else (stage,), TensorParallel(0, tensor))
    built.trainable(stage)
    if fp8:
        hold_in_fp8(built.layers)
    trained = [parameter.numel() for parameter in built.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in built.parameters() if not parameter.requires_grad]
    widths = [parameter.itemsize if parameter.dtype == torch.uint8 else weight_bytes for parameter in frozen]
    frozen_bytes = sum(parameter.numel() * width for parameter, width in zip(frozen, widths, strict=True))
    scales = sum(buffer.nbytes for buffer in built.buffers())
    elements = sum(parameter.numel() for parameter in frozen)
    return Elements(sum(trained), elements, max(trained), weight_bytes, frozen_bytes + scales)


def count_elements(config: Config) -> Elements:
    """What the first tensor-parallel rank holds, from the model on the meta device."""
    model = config.model.model_copy(update={"boi_id": config.model.boi_id or 0, "inherit": None})
    weight_bytes = 2 if config.train.precision == "bf16" else 4
    fp8 = config.train.base_precision == "fp8"
    return _count(model, config.train.stage, config.parallel.tensor, weight_bytes, fp8)


def _whole_elements(config: Config) -> Elements:
    """What all tensor-parallel ranks hold together, without copies and padding."""
    alone = config.parallel.model_copy(update={"tensor": 1})
    return count_elements(config.model_copy(update={"parallel": alone}))


def data_parallel(config: Config, world: int) -> int:
    """Ranks that take different samples.

    Raises:
        ConfigError: The world does not divide.
    """
    tensor, sequence = config.parallel.tensor, config.parallel.sequence
    if world % (tensor * sequence):
        raise ConfigError(
            f"parallel.tensor {tensor} x parallel.sequence {sequence} do not divide the {world} ranks of this run; "
            "start a multiple"
        )
    return world // (tensor * sequence)


def replicas(config: Config, data_size: int) -> int:
    """Ranks that hold the same part of the weights: those of a sequence, too."""
    return data_size * config.parallel.sequence


def accumulation_steps(config: Config, data_size: int) -> int:
    """Micro batches per rank and step.

    Raises:
        ConfigError: The global batch does not divide over ranks and micro batches.
    """
    train, per_pass = config.train, config.train.micro_batch_size * data_size
    passes, rest = divmod(train.global_batch_size, per_pass)
    if rest:
        batches = [str(count * per_pass) for count in (passes, passes + 1) if count]
        ways = [f"train.global_batch_size={' or '.join(batches)}"]
        per_rank, uneven = divmod(train.global_batch_size, data_size)
        if not uneven:
            sizes = divisors(per_rank)
            near = [max((size for size in sizes if size < train.micro_batch_size), default=None)]
            near += [min((size for size in sizes if size > train.micro_batch_size), default=None)]
            ways.append(f"train.micro_batch_size={' or '.join(str(size) for size in near if size)}")
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {data_size} data-parallel ranks = {per_pass}; "
            f"the nearest that divide: {', or '.join(ways)}"
        )
    return passes


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def plan(config: Config, cluster: Cluster, policies: Sequence[Checkpointing] = POLICIES, suggest: bool = True) -> Plan:
    """The plan of a run.

    Args:
        config: The run.
        cluster: Where it runs.
        policies: Activation policies to plan besides the run's own.
        suggest: Also look for what fits, if the run does not.

    Raises:
        ConfigError: Ranks or batches do not divide, or the device lacks what the run asks for.
    """
    config = on_device(config, cluster.device)
    train = config.train
    data_size = data_parallel(config, cluster.world)
    accumulation = accumulation_steps(config, data_size)
    elements = count_elements(config)
    state = engine_state(config, elements, replicas(config, data_size), accumulation, cluster.device.gpu)
    wanted = [policy for policy in POLICIES if policy in policies or policy == train.activation_checkpointing]
    planned = {policy: _plan_policy(config, cluster, policy, data_size) for policy in wanted}
    time = _time(config, cluster, elements, accumulation, data_size)
    seconds = None if time is None else time.seconds
    samples = train.global_batch_size
    work = training_work(config.model, train.stage).model * samples / cluster.world
    whole = _whole_elements(config)
    masters = 0 if elements.weight_bytes == 4 else 1
    found = Plan(
        world=cluster.world, data_size=data_size, accumulation=accumulation,
        trained=elements.trained, frozen=elements.frozen,
        state=tree(state), gradient_bytes=elements.trained * elements.weight_bytes,
        host=host_bytes(config, elements, replicas(config, data_size)) * cluster.gpus_per_node,
        policy=train.activation_checkpointing, policies=planned, usable=cluster.usable_bytes,
        seconds=seconds,
        parts=None if time is None else {name: getattr(time, name) for name in _PARTS},
        sent=None if time is None else time.sent_bytes,
        tokens_per_second=None if not seconds else samples * tokens_per_sample(config.model, train.stage) / seconds,
        model_tflops=None if not seconds else work / seconds / 1e12,
        days=None if seconds is None else seconds * train.steps / 86400,
        gpu_hours=None if seconds is None else seconds * train.steps / 3600 * cluster.world,
        checkpoint=whole.trained * (elements.weight_bytes + 4 * (2 + masters)),
        frozen_checkpoint=whole.frozen * elements.weight_bytes,
        suggestions=[],
    )  # fmt: skip
    if suggest and not found.fits:
        from megacog.planning.suggest import suggestions

        return found.model_copy(update={"suggestions": list(suggestions(config, cluster))})
    return found


def on_device(config: Config, device: Device) -> Config:
    """The run as the device takes it: `train.kernels: auto` is the reference where Triton serves no GPU.

    Raises:
        ConfigError: It asks for a base in e4m3, and the device cannot multiply it.
    """
    train = config.train
    if train.base_precision == "fp8" and device.gpu and device.no_fp8:
        raise ConfigError(
            f"train.base_precision fp8 needs compute capability 8.9 (NVIDIA's Ada, Hopper or later); {device.no_fp8}; "
            "set it to null"
        )
    if train.kernels == "auto" and not device.triton:
        return config.model_copy(update={"train": train.model_copy(update={"kernels": "reference"})})
    return config


_PARTS = ("gemm", "attention", "pointwise", "accumulate", "optimizer", "exposed", "waiting")


def least_bytes(config: Config, data_size: int, gpu: bool) -> float:
    """What one rank needs at the peak with any policy and micro batch, at least; found without a pass of the model."""
    elements = count_elements(config)
    state = engine_state(config, elements, replicas(config, data_size), 1, gpu)
    return state.peak(Pass(), elements.trained * elements.weight_bytes).bytes


def _time(config: Config, cluster: Cluster, elements: Elements, accumulation: int, data_size: int) -> StepTime | None:
    if not cluster.device.gpu:
        return None
    train = config.train
    one = trace_pass(config, train.activation_checkpointing, train.micro_batch_size, gpu=True)
    return step_time(config, cluster, elements, one, accumulation, replicas(config, data_size))


def _plan_policy(config: Config, cluster: Cluster, policy: Checkpointing, data_size: int) -> PolicyPlan:
    one = trace_pass(config, policy, config.train.micro_batch_size, cluster.device.gpu)
    peak = plan_phase(config, data_size, policy, config.train.micro_batch_size, cluster.device.gpu)
    largest = _largest_micro_batch(config, cluster, policy, data_size)
    return PolicyPlan(
        policy=policy, activations=one.saved, fits=peak.bytes <= cluster.usable_bytes, largest_micro_batch=largest,
        peak=peak.bytes, peak_when=peak.name,
        peak_parts={"state": peak.state, "activations": peak.activations, "more": peak.more},
    )  # fmt: skip


def _largest_micro_batch(config: Config, cluster: Cluster, policy: Checkpointing, data_size: int) -> int:
    def fits(size: int) -> bool:
        return plan_peak(config, data_size, policy, size, cluster.device.gpu) <= cluster.usable_bytes

    if not fits(2):
        return 1 if fits(1) else 0
    low = high = 2
    while high < _LARGEST_TRIED and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def plan_peak(config: Config, data_size: int, policy: Checkpointing, micro_batch: int, gpu: bool) -> float:
    """Peak bytes of one rank: see `plan_phase`."""
    return plan_phase(config, data_size, policy, micro_batch, gpu).bytes


def plan_phase(config: Config, data_size: int, policy: Checkpointing, micro_batch: int, gpu: bool) -> Phase:
    """The phase with the peak of one rank, with another policy and micro batch than the run's own.

    Gradients are taken to be accumulated where the micro batch does not divide.
    """
    accumulation = -(-config.train.global_batch_size // (micro_batch * data_size))
    elements = count_elements(config)
    state = engine_state(config, elements, replicas(config, data_size), accumulation, gpu)
    return state.peak(trace_pass(config, policy, micro_batch, gpu), elements.trained * elements.weight_bytes)
