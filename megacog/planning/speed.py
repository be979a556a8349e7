"""Predicted time of a step: work over rates, gradient by gradient over links. docs/scaling.md writes the model down."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, log, log2, sqrt

from megacog.config.schema import Config
from megacog.planning.cluster import Cluster
from megacog.planning.memory import REDUCE_BUCKET, Elements, uses_bf16_optimizer
from megacog.planning.trace import Pass

_ADAM_BYTES = 40
"""Per optimizer element: torch's fused AdamW reads weight, gradient and both moments and writes all but the gradient
(28), the norm reads 4, clipping 8."""
_HOST_ADAM_BYTES = 50
"""The same in the host's memory: besides, gradients arrive (4), and the cast for the way back takes 6."""


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one optimizer step, and what goes over the links."""

    gemm: float
    attention: float
    pointwise: float
    accumulate: float
    """Adding gradients of micro batches to their sums."""
    optimizer: float
    exposed: float
    """Communication that nothing hides."""
    waiting: float
    """For the slowest rank."""
    sent_bytes: float
    """By one rank."""

    @property
    def seconds(self) -> float:
        computed = self.gemm + self.attention + self.pointwise + self.accumulate + self.optimizer
        return computed + self.exposed + self.waiting


def step_time(
    config: Config, cluster: Cluster, elements: Elements, one: Pass, accumulation: int, replicas: int
) -> StepTime | None:
    """Predicted time of a step; None for a device whose peak is not known.

    Args:
        config: The run.
        cluster: Where it runs.
        elements: Weights of one rank.
        one: A micro batch's pass.
        accumulation: Micro batches of one rank per step.
        replicas: Ranks that average their gradients.
    """
    device, assumed = cluster.device, cluster.assumptions
    if device.peak_tflops is None:
        return None
    peak, bandwidth = device.peak_tflops * 1e12, device.bandwidth * assumed.bandwidth_share
    trained, w = elements.trained, elements.weight_bytes
    updated = trained / (replicas if config.train.engine == "deepspeed" and config.train.zero_stage else 1)
    traffic = _Traffic(cluster)
    _average_gradients(config, traffic, elements, accumulation, replicas)
    _share_layers(config, traffic, one, accumulation)
    sums = 4 if config.train.gradient_dtype == "fp32" else w
    passes = one.gemm_flops / (peak * assumed.gemm_share)
    attention = (one.attention_flops + one.attention_backward_flops) / (peak * assumed.attention_share)
    time = StepTime(
        gemm=accumulation * passes,
        attention=accumulation * attention,
        pointwise=accumulation * one.pointwise_bytes / bandwidth,
        accumulate=accumulation * trained * (w + 3 * sums) / bandwidth,  # read, cast, add to what is there
        optimizer=updated * _update_seconds(config, cluster, w),
        exposed=traffic.seconds,
        waiting=0,
        sent_bytes=traffic.sent,
    )
    slowest = assumed.spread * sqrt(2 * log(cluster.world))  # the expected largest of so many normal deviations
    return replace(time, waiting=slowest * (time.seconds - time.exposed))


def _update_seconds(config: Config, cluster: Cluster, weight_bytes: int) -> float:
    """Of one element on one rank, all ranks of a node at a time."""
    assumed = cluster.assumptions
    if not config.train.offload_optimizer:
        return (_ADAM_BYTES + weight_bytes) / (cluster.device.bandwidth * assumed.bandwidth_share)
    gradient = 4 if config.train.gradient_dtype == "fp32" else 2
    host = _HOST_ADAM_BYTES * cluster.gpus_per_node / assumed.host_bandwidth
    return host + (gradient + weight_bytes) / assumed.pcie_bandwidth


class _Traffic:
    """Collectives of one rank, one after the other."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.seconds = self.sent = 0.0

    def ring(self, rounds: int, size: float, ranks: int, neighbors: int = 1, calls: float = 1) -> None:
        """`calls` collectives over `size` bytes in all: 1 round gathers or scatters them, 2 rounds sum them."""
        if ranks == 1:
            return
        sent = rounds * size * (ranks - 1) / ranks
        hops = calls * ceil(log2(ranks)) * self._cluster.assumptions.latency
        self.sent += sent
        self.seconds += sent / self._cluster.ring_bandwidth(ranks, neighbors) + hops


def _average_gradients(config: Config, traffic: _Traffic, elements: Elements, accumulation: int, replicas: int) -> None:
    """What ZeRO sends, none of it behind computation: DeepSpeed overlaps only if `overlap_comm` asks for it."""
    train, tensor = config.train, config.parallel.tensor
    size = elements.trained * elements.weight_bytes
    zero = config.deepspeed.get("zero_optimization", {})
    buckets = ceil(elements.trained / int(zero.get("reduce_bucket_size", REDUCE_BUCKET)))
    if train.engine == "torch":
        traffic.ring(2, 4 * elements.trained, replicas, tensor)
        return
    times = accumulation if train.zero_stage >= 2 else 1  # ZeRO 2 and 3 keep no whole gradients between micro batches
    if train.zero_stage == 3:
        traffic.ring(1, 2 * times * elements.weights, replicas, tensor, 2 * times * config.model.num_layers)
        traffic.ring(1, times * size, replicas, tensor, times * buckets)
        return
    traffic.ring(2, times * size, replicas, tensor, times * (2 if uses_bf16_optimizer(config) else buckets))
    if train.zero_stage:
        traffic.ring(1, size, replicas, tensor, 2)


def _share_layers(config: Config, traffic: _Traffic, one: Pass, accumulation: int) -> None:
    """What ranks that share a model or a sample send, in the passes of all micro batches."""
    tensor, sequence = config.parallel.tensor, config.parallel.sequence
    traffic.ring(2, accumulation * one.sum_bytes, tensor, 1, accumulation * one.sums)
    traffic.ring(1, accumulation * one.gather_bytes, tensor, 1, accumulation * one.gathers)
    traffic.ring(1, accumulation * one.exchange_bytes, sequence, 1, accumulation * one.exchanges)
