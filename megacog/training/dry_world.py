"""A run's whole world on one machine without its memory: DeepSpeed itself, rank by rank, on fake tensors.

Tensors have shapes and no data, the process group answers without talking to anyone, and everything else is real:
the model, its kernels' operators, DeepSpeed's engine, its buffers and its steps. Shown are

- that the fragments of all ranks cover every trained parameter exactly once,
- that every rank holds as many bytes as planned,
- and that the peak of some ranks over two optimizer steps is as planned.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megacog.config.load import load_config
from megacog.config.schema import Config
from megacog.errors import ConfigError
from megacog.model.transformer import CogVideo
from megacog.parallel.fp8 import hold_in_fp8
from megacog.parallel.groups import ProcessGroups, build_process_groups
from megacog.planning.cluster import GIB
from megacog.planning.memory import engine_state
from megacog.planning.plan import accumulation_steps, count_elements, data_parallel, plan_peak, replicas
from megacog.planning.trace import Ledger, as_on_a_gpu, default_dtype
from megacog.runtime.cli import run
from megacog.training import optimizer
from megacog.training.engine import build_engine
from megacog.training.precision import DTYPES
from megacog.training.pretrain import example_inputs

BYTES_ACCEPTED = 0.01
PEAK_ACCEPTED = 0.05
Fragments = dict[str, tuple[int, int]]
"""Trained parameter -> first element and number of elements that a rank updates."""


@dataclass(frozen=True)
class RankReport:
    """What one rank of the dry world came to."""

    rank: int
    fragments: Fragments
    shapes: dict[str, int]
    """Elements of every trained parameter."""
    held: int
    """Bytes after the engine is built."""
    held_after: int | None = None
    """Bytes after two optimizer steps, if it took them."""
    peak: int | None = None
    """Most bytes at once in the second step."""


@dataclass(frozen=True)
class WorldReport:
    """All ranks against the plan."""

    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def run_rank(config: Config, world: int, rank: int, steps: bool) -> RankReport:
    """Build the run's engine as one rank of a fake world and, if asked, take two optimizer steps.

    Leaves torch.distributed and DeepSpeed's globals behind: one rank per process.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    groups = build_process_groups(config.parallel.tensor, config.parallel.sequence)
    with _no_data():
        model = _fake_model(config, groups)
        ledger = Ledger(())
        with ledger:
            for tensor in (*model.parameters(), *model.buffers()):
                ledger.enter(tensor)
            accumulation = accumulation_steps(config, groups.data_size)
            engine = build_engine(config, model, groups, accumulation)
            fragments, shapes = _fragments(model), _trained(model)
            held = ledger.live
            if not steps:
                return RankReport(rank, fragments, shapes, held)
            inputs = example_inputs(config, torch.device("cpu"))
            for _ in range(2):
                ledger.forget_peaks()
                for _ in range(accumulation):
                    engine.backward(engine.forward(**inputs).loss)
                engine.step(1e-4)
    return RankReport(rank, fragments, shapes, held, ledger.live, ledger.peak)


def _fake_model(config: Config, groups: ProcessGroups) -> CogVideo:
    train = config.train
    with default_dtype(DTYPES[train.precision]):
        plus = () if train.stage == "base" else (train.stage,)
        shared = (groups.tensor, train.activation_checkpointing, train.kernels, groups.sequence, train.deterministic)
        model = CogVideo(config.model, plus, *shared)
    model.trainable(train.stage)
    if train.base_precision == "fp8":
        hold_in_fp8(model.layers)
    return model


def _trained(model: nn.Module) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _fragments(model: nn.Module) -> Fragments:
    """What DeepSpeed has linked this rank's share of the optimizer to (ZeRO 1 and 2)."""
    found = {}
    for name, parameter in model.named_parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            address = mapping.lp_fragment_address
            found[name] = (address.start, address.numel)
    return found


class _AnswerScalars(TorchDispatchMode):
    """Numbers that the host asks for: norms and steps are 1, counts of overflows 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 0
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_data() -> Iterator[None]:
    """Fake tensors, and answers to what DeepSpeed asks of real ones: addresses are aligned, moving changes nothing."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tensor, "data_ptr", lambda _: 0))
        stack.enter_context(mock.patch.object(nn.Module, "to", lambda module, *_, **__: module))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(as_on_a_gpu())
        stack.enter_context(mock.patch.object(optimizer, "updates_on_gpu", lambda _: True))
        stack.enter_context(_AnswerScalars())
        yield


def compare(config: Config, world: int, ranks: Iterable[int], stepping: Sequence[int], processes: int) -> WorldReport:
    """Run the ranks, `stepping` ones with two steps, and compare them with the plan.

    Raises:
        ConfigError: The run does not divide, or its engine cuts nothing.
    """
    train = config.train
    if train.engine != "deepspeed" or train.zero_stage not in (1, 2):
        raise ConfigError("the dry world shows ZeRO 1 and 2: train.engine deepspeed, train.zero_stage 1 or 2")
    data_size = data_parallel(config, world)
    jobs = [(config, world, rank, rank in stepping) for rank in ranks]
    context = multiprocessing.get_context("fork")  # so that packages are imported once
    with context.Pool(processes, maxtasksperchild=1) as pool:
        reports = pool.starmap(run_rank, jobs, chunksize=1)
    found = WorldReport()
    elements = count_elements(config)
    state = engine_state(config, elements, replicas(config, data_size), accumulation_steps(config, data_size), gpu=True)
    if {rank for _, _, rank, _ in jobs} == set(range(world)):
        found.problems.extend(_coverage(reports, config.parallel.tensor))
        found.lines.append(f"{len(reports)} ranks: fragments of {len(reports[0].shapes)} trained parameters")
    for report in reports:
        _compare_bytes(found, report, "held", report.held, state.built, BYTES_ACCEPTED)
        if report.peak is not None and report.held_after is not None:
            peak = plan_peak(config, data_size, train.activation_checkpointing, train.micro_batch_size, gpu=True)
            _compare_bytes(found, report, "peak", report.peak, peak, PEAK_ACCEPTED)
    return found


def _compare_bytes(
    found: WorldReport, report: RankReport, what: str, actual: float, planned: float, accepted: float
) -> None:
    difference = planned / actual - 1
    sizes = f"planned {planned / GIB:9.4f} GiB  dry run {actual / GIB:9.4f} GiB"
    line = f"rank {report.rank:4}  {what:5}  {sizes}  {100 * difference:+6.2f} %"
    found.lines.append(line)
    if abs(difference) > accepted:
        found.problems.append(f"{line}: not within {100 * accepted:g} %")


def _coverage(reports: Sequence[RankReport], tensor: int) -> Iterator[str]:
    """What of a trained parameter no rank updates, or more than one; per tensor-parallel place."""
    for place in range(tensor):
        mine = [report for report in reports if report.rank % tensor == place]
        for name, size in mine[0].shapes.items():
            pieces = sorted(report.fragments[name] for report in mine if name in report.fragments)
            end = 0
            for start, length in pieces:
                if start != end:
                    owners = "no owner" if start > end else "two owners"
                    yield f"{name}: elements {min(start, end)} to {max(start, end)} have {owners}"
                end = start + length
            if end != size:
                yield f"{name}: {end} of {size} elements have an owner"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prove.py world`; returns 0 if all is as planned."""
    parser = argparse.ArgumentParser(prog="prove.py world", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=13)
    parser.add_argument("--gpus", type=int, default=8, help="per node")
    parser.add_argument("--ranks", type=_numbers, metavar="RANK,...", help="run these only; default: all")
    parser.add_argument("--steps", type=_numbers, metavar="RANK,...", help="take two steps; default: 0, middle, last")
    parser.add_argument("--processes", type=int, default=1, help="ranks at a time")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    arguments = parser.parse_args(argv)
    world = arguments.nodes * arguments.gpus
    config = load_config(arguments.config, arguments.overrides)
    stepping = arguments.steps if arguments.steps is not None else [0, world // 2 - 1, world - 1]
    report = compare(config, world, arguments.ranks or range(world), stepping, arguments.processes)
    print("\n".join([*report.lines, *report.problems]))
    print("as planned" if not report.problems else f"NOT as planned: {len(report.problems)} problems")
    return 1 if report.problems else 0


if __name__ == "__main__":
    run(main)
