"""The planned peak of memory against the measured one, for every engine and activation policy, on small models.

Measured is what the CPU allocator handed out (torch's profiler reports every allocation and release) over two real
optimizer steps; the peak is that of the second, when all states exist.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from megacog.config.schema import Checkpointing, Config, Stage
from megacog.parallel.groups import ProcessGroups, build_process_groups
from megacog.planning.main import positive
from megacog.planning.plan import POLICIES, data_parallel, plan_peak
from megacog.runtime.cli import run
from megacog.training.pretrain import example_inputs
from megacog.training.synthetic import random_engine

ACCEPTED = 0.05
"""Largest relative difference of planned and measured peak."""
ACCUMULATION = 2
ENGINES = ("torch-bf16", "torch-fp32", "zero0-fp32", "zero1-fp32", "zero1-bf16", "zero2-bf16", "zero3-bf16")
_MARK = "planned: second step"


@dataclass(frozen=True)
class Comparison:
    """Bytes of one rank."""

    planned: float
    measured: float

    @property
    def difference(self) -> float:
        """Relative to what was measured."""
        return self.planned / self.measured - 1


def small_run(
    engine: str, policy: Checkpointing, world: int, layers: int = 8, micro_batch: int = 2, stage: Stage = "sequential",
    tensor: int = 1, sequence: int = 1,
) -> Config:  # fmt: skip
    """A run of a small model: width 128, 8 x 8 codes per frame; `engine` as in ENGINES."""
    name, precision = engine.split("-")
    zero = int(name[-1]) if name != "torch" else 0
    model = {
        "num_layers": layers, "hidden_size": 128, "num_heads": 4, "grid": (8, 8), "text_length": 16,
        "text_positions": 16, "image_vocab_size": 500, "text_vocab_size": 300, "boi_id": 3,
        "inherit": None if stage == "base" else "none",
    }  # fmt: skip
    train = {
        "stage": stage, "run_dir": "none", "engine": "torch" if name == "torch" else "deepspeed",
        "zero_stage": zero, "steps": 2, "global_batch_size": micro_batch * ACCUMULATION * world // (tensor * sequence),
        "micro_batch_size": micro_batch, "precision": precision, "activation_checkpointing": policy,
    }  # fmt: skip
    # DeepSpeed's own buckets are for models a thousand times as large.
    zero_settings = {"reduce_bucket_size": 200_000}
    if zero == 3:
        zero_settings |= {"stage3_param_persistence_threshold": 0}
    extra = {} if name == "torch" else {"zero_optimization": zero_settings}
    tokenizer = {"text": "none", "frames": "none"}
    parallel = {"tensor": tensor, "sequence": sequence}
    return Config.model_validate(
        {"model": model, "tokenizer": tokenizer, "train": train, "deepspeed": extra, "parallel": parallel}
    )


def measure_peak(config: Config, groups: ProcessGroups) -> int:
    """Most bytes that this rank's allocator has handed out at once in the second optimizer step. Collective."""
    gc.collect()
    with _works_released_here(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        engine = random_engine(config, torch.device("cpu"), groups)
        inputs = example_inputs(config, torch.device("cpu"))
        for step in range(2):
            with record_function(f"{_MARK} {step}"):
                for _ in range(ACCUMULATION):
                    engine.backward(engine.forward(**inputs).loss)
                engine.step(1e-4)
    return _peak_within(recorded, f"{_MARK} 1")


_COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all_single", "broadcast", "reduce",
    "reduce_scatter_tensor",
)  # fmt: skip
_HANDS_OFF = 0.02
"""Seconds in which gloo's thread lets go of a collective that is done."""


@contextmanager
def _works_released_here() -> Iterator[None]:
    """Collectives whose tensors this thread is the last to let go of: the profiler sees what this thread releases, not
    what gloo's threads do."""
    plain = {name: getattr(dist, name) for name in _COLLECTIVES}

    def holding(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, async_op: bool = False, **named: Any) -> Any:
            work = collective(*arguments, async_op=True, **named)
            if work is not None:
                work.wait()
                time.sleep(_HANDS_OFF)
            return work if async_op else None

        return call

    for name, collective in plain.items():
        setattr(dist, name, holding(collective))
    try:
        yield
    finally:
        for name, collective in plain.items():
            setattr(dist, name, collective)


def _peak_within(recorded: profile, mark: str) -> int:
    """Largest sum of allocations minus releases between begin and end of the marked region.

    Releases of what was allocated before the recording, by an earlier run in this process, do not count.
    """
    region, changes = None, []
    waiting = recorded.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == mark:
            region = event
        elif event.tag == _EventType.Allocation:
            allocation: Any = event.extra_fields
            changes.append((event.start_time_ns, allocation.ptr, allocation.alloc_size))
    assert region is not None
    living: dict[int, int] = {}
    total = peak = 0
    for when, place, size in sorted(changes):
        if when > region.end_time_ns:
            break
        # What other threads release is not recorded: it shows when the place is given out again.
        total -= living.pop(place, 0)
        if size > 0:
            living[place] = size
            total += size
        if when >= region.start_time_ns:
            peak = max(peak, total)
    return peak


def compare(engine: str, policy: Checkpointing, stage: Stage, tensor: int, sequence: int) -> Comparison:
    """Plan and measurement of one small run on the ranks of this world. Collective."""
    world = dist.get_world_size()
    config = small_run(engine, policy, world, stage=stage, tensor=tensor, sequence=sequence)
    planned = plan_peak(config, data_parallel(config, world), policy, config.train.micro_batch_size, gpu=False)
    return Comparison(planned, measure_peak(config, build_process_groups(tensor, sequence)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `plan.py check`: start the ranks, or be one of them; returns 0 if all differences are within 5 %."""
    parser = argparse.ArgumentParser(prog="plan.py check", description=__doc__)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2], help="world sizes")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--stage", choices=get_args(Stage), default="sequential")
    parser.add_argument("--tensor", type=positive, default=1, help="ranks that share a model")
    parser.add_argument("--sequence", type=positive, default=1, help="ranks that share a sample")
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ:
        return max(_start_ranks(arguments, ranks) for ranks in arguments.ranks)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    accepted = True
    for engine in arguments.engines:
        for policy in arguments.policies:
            found = compare(engine, policy, arguments.stage, arguments.tensor, arguments.sequence)
            accepted &= abs(found.difference) <= ACCEPTED
            if dist.get_rank() == 0:
                print(
                    f"{dist.get_world_size():5}  {engine:11}  {policy:9}  {found.planned / 2**20:9.2f}  "
                    f"{found.measured / 2**20:9.2f}  {100 * found.difference:+6.1f} %",
                    flush=True,
                )
    dist.destroy_process_group()
    return 0 if accepted else 1


def _start_ranks(arguments: argparse.Namespace, ranks: int) -> int:
    if ranks == arguments.ranks[0]:
        print("ranks  engine       policy     plan/MiB  measured  difference", flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["-m", "megacog.training.memory_check", "--engines", *arguments.engines]
    command += ["--policies", *arguments.policies, "--stage", arguments.stage]
    command += ["--tensor", str(arguments.tensor), "--sequence", str(arguments.sequence)]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "KINETO_LOG_LEVEL": "6"}
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    run(main)
