"""Memory of a training state and of its steps, per rank, for every engine.

The rules follow what the engines allocate, read in their sources (DeepSpeed 0.19) and checked against tracked
allocations (`python launch/plan.py check`). Elements: T trained and F frozen on this rank, R replicas that share the
optimizer's work (ZeRO), w bytes of a weight, a bytes of an accumulated gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from megacog.config.schema import Config
from megacog.planning.trace import Pass

FP32 = 4
ADAM_MOMENTS = 2 * FP32
REDUCE_BUCKET = 500_000_000
"""DeepSpeed's default zero_optimization.reduce_bucket_size, in elements; its engine's buckets are as large."""
MAX_LIVE = 1_000_000_000
"""Default of stage3_max_live_parameters: elements that ZeRO 3 keeps gathered."""
PREFETCH = 50_000_000
"""Default of stage3_prefetch_bucket_size: elements that ZeRO 3 gathers ahead in one buffer."""


@dataclass(frozen=True)
class Elements:
    """What one rank holds before ZeRO cuts anything."""

    trained: int
    frozen: int
    largest: int
    """Of the largest trained tensor."""
    weight_bytes: int
    """Of one trained element."""
    frozen_bytes: int
    """Of all frozen ones: in e4m3, or as wide as the trained."""

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.trained * self.weight_bytes + self.frozen_bytes


@dataclass(frozen=True)
class Phase:
    """Bytes that are alive in one part of a run."""

    name: str
    """When it is, to go on a sentence."""
    state: float
    """That an engine holds, with the gradients on the weights, or a model that is being built."""
    activations: float
    more: float
    """Besides: buffers, copies, gathered weights."""

    @property
    def bytes(self) -> float:
        return self.state + self.activations + self.more


@dataclass(frozen=True)
class State:
    """Bytes that an engine holds on one rank."""

    weights: float = 0
    building: float = 0
    """Weights while the model is built, where they are cut afterwards: every rank first holds them whole."""
    masters: float = 0
    """fp32 copies of what is trained."""
    moments: float = 0
    """Both moments of AdamW."""
    accumulated: float = 0
    """Gradients summed over micro batches, in buffers of the engine."""
    gradients: float = 0
    """Gradients that autograd leaves on the weights, while forward passes run."""
    buckets: float = 0
    """Communication buffers that stay, and weights gathered by ZeRO 3."""
    keeps_gradients: bool = False
    """A backward pass ends with all gradients on the weights; else each is consumed at once."""
    sums_late: bool = False
    """The buffers of summed gradients appear in the first backward pass of a step; else they are always there."""
    in_backward: float = 0
    """Besides, from the first gradient of a backward pass on."""
    in_flush: float = 0
    """Besides that, when a bucket is full and goes out,"""
    flush_after: float = 0
    """which first happens after this share of all gradients: as much of the activations is gone."""
    in_forward: float = 0
    """Besides, while weights are gathered."""
    in_reduction: float = 0
    """Besides, when gradients are averaged after the last backward pass, or weights gathered before the first layer."""
    in_step: float = 0
    """Besides, while the optimizer steps."""

    @property
    def resident(self) -> float:
        """What is there all the time."""
        return self.weights + self.masters + self.moments + self.accumulated + self.buckets

    @property
    def built(self) -> float:
        """What is there before the first step."""
        return self.weights + self.masters + (0 if self.sums_late else self.accumulated)

    def peak(self, one: Pass, whole_gradients: float) -> Phase:
        """The phase of building or of a step in which most bytes are alive at once.

        Args:
            one: A micro batch's pass.
            whole_gradients: Bytes of one gradient per trained weight.
        """
        held = self.resident + self.gradients
        growing = self.keeps_gradients and not self.gradients
        backward = max(one.peak_after, one.peak_kept if growing else 0)
        left = backward - self.flush_after * one.saved
        kept = whole_gradients if self.keeps_gradients else 0
        phases = (
            Phase("while the model is built", self.building, 0, 0),
            Phase("in a forward pass", held, one.peak_before, self.in_forward),
            Phase("in a backward pass", held, backward, self.in_backward),
            Phase("while a bucket of gradients goes out", held, left, self.in_backward + self.in_flush),
            Phase("while gradients are averaged", self.resident + kept, 0, self.in_reduction),
            Phase("while AdamW steps", self.resident + kept, 0, self.in_step),
        )
        return max(phases, key=lambda phase: phase.bytes)


def engine_state(config: Config, elements: Elements, replicas: int, accumulation: int, gpu: bool) -> State:
    """What the run's engine holds on one rank after its first step.

    Args:
        config: The run.
        elements: This rank's weights.
        replicas: Ranks that ZeRO cuts over: data x sequence.
        accumulation: Micro batches per step.
        gpu: Whether AdamW runs over all tensors at once, as torch does on GPUs, or one by one.
    """
    train = config.train
    a = FP32 if train.gradient_dtype == "fp32" else 2
    if train.engine == "torch":
        return _plain(elements, a, gpu)
    zero = {"stage": train.zero_stage, **config.deepspeed.get("zero_optimization", {})}
    if train.zero_stage == 0:
        return _without_zero(elements, replicas, accumulation, gpu)
    if train.zero_stage == 3:
        return _zero_3(elements, a, replicas, zero, gpu)
    if train.offload_optimizer:
        return _offloaded(elements, a, zero)
    if uses_bf16_optimizer(config):
        return _bf16_optimizer(elements, replicas, accumulation, gpu)
    return _zero_1_2(elements, a, replicas, accumulation, zero, gpu)


def host_bytes(config: Config, elements: Elements, replicas: int) -> float:
    """What an offloaded optimizer takes of the host's memory for one rank: masters, moments, gradients, and a pinned
    copy of the weights on their way back."""
    if not config.train.offload_optimizer:
        return 0
    return (FP32 + ADAM_MOMENTS + FP32 + elements.weight_bytes) * elements.trained / replicas


def uses_bf16_optimizer(config: Config) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer: ZeRO 1 on the device with bf16 weights and fp32 sums of gradients."""
    train = config.train
    found = (train.engine, train.zero_stage, train.precision, train.gradient_dtype)
    return found == ("deepspeed", 1, "bf16", "fp32") and not train.offload_optimizer


def _plain(elements: Elements, a: int, gpu: bool) -> State:
    T, w = elements.trained, elements.weight_bytes
    return State(
        weights=elements.weights,
        masters=FP32 * T if w < FP32 else 0,
        moments=ADAM_MOMENTS * T,
        accumulated=a * T,
        keeps_gradients=True,
        in_step=FP32 * T - w * T + _adam(T, elements.largest, gpu),  # scaled copies; autograd's gradients are gone
    )


def _without_zero(elements: Elements, replicas: int, accumulation: int, gpu: bool) -> State:
    T, w = elements.trained, elements.weight_bytes
    return State(
        weights=elements.weights,
        moments=ADAM_MOMENTS * T,
        gradients=w * T if accumulation > 1 else 0,
        keeps_gradients=True,
        in_reduction=w * min(T, REDUCE_BUCKET + elements.largest) if replicas > 1 else 0,
        in_step=_adam(T, elements.largest, gpu),
    )


def _bf16_optimizer(elements: Elements, replicas: int, accumulation: int, gpu: bool) -> State:
    """ZeRO 1 in bf16: gradients stay whole in fp32 on every rank, and autograd's own stay beside them.

    They are flattened into a copy for the all-reduce, which runs on a second copy in bf16: a parameter group is one
    tensor there, so buckets do not bound these copies.
    """
    T, w, share = elements.trained, elements.weight_bytes, elements.trained / replicas
    return State(
        weights=elements.weights,
        masters=FP32 * share,
        moments=ADAM_MOMENTS * share,
        accumulated=FP32 * T,
        gradients=w * T if accumulation > 1 else 0,
        keeps_gradients=True,
        in_backward=FP32 * elements.largest,  # the cast gradient
        in_reduction=(FP32 + w) * T,
        in_step=_adam(share, share, gpu),
    )


def _zero_1_2(elements: Elements, a: int, replicas: int, accumulation: int, zero: dict[str, Any], gpu: bool) -> State:
    """Gradients pass through a bucket and its flattened copy; a rank keeps its share of them."""
    T, w, share = elements.trained, elements.weight_bytes, elements.trained / replicas
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    buffers = w * bucket * (2 if zero.get("overlap_comm") else 1)
    flattened = w * min(bucket, T)
    compact = w != a
    stage_1 = zero["stage"] == 1
    accumulated = a * share if (compact or accumulation > 1) and not stage_1 else 0
    averaged = 0 if compact else a * share  # made when the last backward pass ends
    return State(
        weights=elements.weights,
        masters=FP32 * share,
        moments=ADAM_MOMENTS * share,
        accumulated=accumulated,
        gradients=w * T if stage_1 and accumulation > 1 else 0,
        buckets=buffers if stage_1 and accumulation > 1 else 0,
        keeps_gradients=stage_1,
        sums_late=True,
        in_backward=(0 if stage_1 and accumulation > 1 else buffers) + (a + w) * elements.largest,
        in_flush=flattened,
        flush_after=min(1, bucket / T),
        in_reduction=buffers + flattened + averaged,
        in_step=2 * averaged + _adam(share, share, gpu),
    )


def _offloaded(elements: Elements, a: int, zero: dict[str, Any]) -> State:
    """ZeRO 1 with masters, moments and the step in the host's memory; gradients are summed on the device.

    Each rank sums all of them, and in the last backward pass those that autograd made and copies of them to send
    stand beside the sums.
    """
    T, w = elements.trained, elements.weight_bytes
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    return State(
        weights=elements.weights, accumulated=a * T, buckets=2 * a * min(bucket, T), in_reduction=(w + a) * T,
    )  # fmt: skip


def _zero_3(elements: Elements, a: int, replicas: int, zero: dict[str, Any], gpu: bool) -> State:
    """Weights are cut, too, frozen ones as well, and gathered layer by layer."""
    T, w, share = elements.trained, elements.weight_bytes, elements.trained / replicas
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    live = w * min(elements.trained + elements.frozen, int(zero.get("stage3_max_live_parameters", MAX_LIVE)))
    ahead = w * min(elements.trained + elements.frozen, int(zero.get("stage3_prefetch_bucket_size", PREFETCH)))
    if replicas == 1:
        live = ahead = 0
    at_once = elements.weights <= ahead  # all that is gathered comes before there are activations
    return State(
        weights=elements.weights / replicas,
        building=elements.weights,
        masters=FP32 * share,
        moments=ADAM_MOMENTS * share,
        accumulated=a * share,
        buckets=w * bucket * (2 if replicas > 1 else 1) + ahead / replicas,  # this rank's part of what is gathered
        in_forward=live if at_once else live + ahead,
        in_backward=live,
        in_flush=w * min(bucket, T),
        flush_after=min(1, bucket / T),
        in_reduction=live + ahead,
        in_step=FP32 * share + _adam(share, share, gpu),
    )


def _adam(elements: float, largest: float, gpu: bool) -> float:
    """Temporaries of torch's AdamW: on a GPU, where it is fused, none; on a CPU the root of one tensor's second moment,
    its quotient, and the quotient of the tensor before."""
    return 0.0 if gpu else FP32 * min(3 * largest, 2 * elements)


def tree(state: State) -> dict[str, float]:
    """The numbers by name."""
    no_bytes = ("keeps_gradients", "sums_late", "flush_after")
    return {field.name: getattr(state, field.name) for field in fields(state) if field.name not in no_bytes}
