"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megacog.config.schema import Config
from megacog.planning.cluster import GIB, Cluster
from megacog.planning.plan import Plan

_STATE = {
    "weights": "weights",
    "building": "whole weights while built",
    "masters": "fp32 masters",
    "moments": "moments of AdamW",
    "accumulated": "summed gradients",
    "gradients": "gradients on the weights",
    "buckets": "buckets, gathered weights",
    "in_forward": "more while weights are gathered",
    "in_backward": "more in a backward pass",
    "in_flush": "more while a bucket goes out",
    "in_reduction": "more while gradients are averaged",
    "in_step": "more while AdamW steps",
}
_PARTS = {
    "gemm": "matrix products",
    "attention": "attention",
    "pointwise": "pointwise operators",
    "accumulate": "summing gradients",
    "optimizer": "AdamW",
    "exposed": "communication, exposed",
    "waiting": "waiting for the slowest",
}


def describe(plan: Plan, config: Config, cluster: Cluster) -> str:
    """All of a plan for people."""
    gpu = cluster.device.gpu
    parts = (_head(plan, config, cluster), _memory(plan), _speed(plan, config), _verdict(plan, config, gpu))
    return "\n".join(line for part in parts for line in part)


def refusal(plan: Plan, config: Config, gpu: bool) -> str:
    """Why a run cannot start, in one message."""
    lines = [
        f"the run needs {plan.peak / GIB:.1f} GiB per {'GPU' if gpu else 'rank'} and tensors may take "
        f"{plan.usable / GIB:.1f} GiB (train.micro_batch_size {config.train.micro_batch_size}, "
        f"train.activation_checkpointing {plan.policy}; {_at_peak(plan)})",
        *_what_fits(plan),
    ]
    return "\n".join(lines)


def _at_peak(plan: Plan) -> str:
    """When the peak is, and what it is made of."""
    policy = plan.policies[plan.policy]
    parts = [f"{name} {size / GIB:.1f}" for name, size in policy.peak_parts.items() if size]
    return f"{policy.peak_when}: {' + '.join(parts)} = {policy.peak / GIB:.1f} GiB"


def _head(plan: Plan, config: Config, cluster: Cluster) -> Iterator[str]:
    train, device = config.train, cluster.device
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''} x {cluster.gpus_per_node} {device.name}"
    engine = "plain engine" if train.engine == "torch" else f"ZeRO {train.zero_stage}"
    shared = f"tensor {config.parallel.tensor} x sequence {config.parallel.sequence}"
    yield f"{nodes} of {device.memory_gib:g} GiB = {plan.world} ranks: {shared} x data {plan.data_size}"
    yield (
        f"stage {train.stage}, {train.precision}, {engine}, sums of gradients in {train.gradient_dtype}; "
        f"batch {train.global_batch_size} = {plan.accumulation} x {train.micro_batch_size} x {plan.data_size} ranks"
    )


def _memory(plan: Plan) -> Iterator[str]:
    yield "\nper rank"
    total = plan.trained + plan.frozen
    yield f"  parameters {total:>28,}   trained {plan.trained:,}, frozen {plan.frozen:,}"
    for key, name in _STATE.items():
        if plan.state[key]:
            yield f"  {name:34} {plan.state[key] / GIB:8.2f} GiB"
    yield "\nactivations            per micro batch      peak   largest micro batch"
    for name, policy in plan.policies.items():
        notes = ("" if policy.fits else "   does not fit") + ("  <- this run" if name == plan.policy else "")
        sizes = f"{policy.activations / GIB:18.2f} GiB {policy.peak / GIB:9.2f} GiB"
        yield f"  {name:10} {sizes} {policy.largest_micro_batch:8}{notes}"
    yield f"  usable     {'':18}     {plan.usable / GIB:10.2f} GiB"
    if plan.host:
        yield f"\nhost memory for the optimizer: {plan.host / GIB:.1f} GiB per node"


def _speed(plan: Plan, config: Config) -> Iterator[str]:
    frozen = f"{plan.frozen_checkpoint / GIB:.1f} GiB once for frozen weights"
    yield f"\ndisk: {plan.checkpoint / GIB:.1f} GiB per checkpoint, {frozen}"
    if plan.parts is None or plan.seconds is None:
        yield "\ntime: not predicted, the peak of this device is not known"
        return
    yield "\npredicted time of a step"
    for key, name in _PARTS.items():
        yield f"  {name:24} {plan.parts[key]:9.4f} s {100 * plan.parts[key] / plan.seconds:6.1f} %"
    yield f"  {'in all':24} {plan.seconds:9.4f} s"
    yield f"  sent by one rank         {(plan.sent or 0) / 1e9:9.2f} GB"
    yield (
        f"predicted: {plan.tokens_per_second:,.0f} tokens/s, {plan.model_tflops:.0f} model TFLOP/s per GPU, "
        f"{plan.days:.1f} days and {plan.gpu_hours:,.0f} GPU-hours for {config.train.steps:,} steps"
    )


def _verdict(plan: Plan, config: Config, gpu: bool) -> Iterator[str]:
    if plan.fits:
        yield f"\nfits: peak {plan.peak / GIB:.1f} of {plan.usable / GIB:.1f} GiB, {_at_peak(plan)}"
    else:
        yield f"\nDOES NOT FIT: {refusal(plan, config, gpu)}"


def _what_fits(plan: Plan) -> Iterator[str]:
    if plan.suggestions:
        yield "What fits on the same GPUs, the fastest first:"
        yield from (f"  {line}" for line in plan.suggestions)
    else:
        yield "Nothing that was tried fits (docs/scaling.md, What to do when it does not fit): take larger or more GPUs"


def weak_scaling(plans: Iterable[Plan], base: Plan, micro_batch: int) -> Iterator[str]:
    """A table of the same work per GPU on more and more GPUs, relative to `base`."""
    rows = [("GPUs", "batch", "peak/GiB", "step/s", "exposed/ms", "tokens/s", "tokens/s/GPU", "efficiency")]
    per_gpu = (base.tokens_per_second or 0) / base.world
    for plan in plans:
        assert plan.tokens_per_second is not None and plan.parts is not None and plan.seconds is not None
        speed = plan.tokens_per_second / plan.world
        batch = plan.data_size * plan.accumulation * micro_batch
        rows.append(
            (
                f"{plan.world}", f"{batch}", f"{plan.peak / GIB:.1f}", f"{plan.seconds:.3f}",
                f"{1e3 * plan.parts['exposed']:.1f}", f"{plan.tokens_per_second:,.0f}", f"{speed:,.0f}",
                f"{100 * speed / per_gpu:.1f} %",
            )
        )  # fmt: skip
    yield from table(rows)


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
