"""Proof that every layout of ranks and every engine is the same optimizer: one small model and its data through each.

The measures are relative differences against the plain engine on one rank: of losses and gradient norms in every step,
and of the trained weights after the last one. Used by the tests, too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megacog.config.schema import Checkpointing, Config, ModelConfig, Stage
from megacog.model.init import initialize_base, initialize_plus
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog.parallel.groups import ProcessGroups, build_process_groups
from megacog.runtime.cli import run
from megacog.training.engine import Engine, build_engine
from megacog.training.schedule import learning_rate
from megacog.training.state import gather_whole

GLOBAL_BATCH, MICRO_BATCH = 8, 2
CLIP = 0.01
TOLERANCE = 1e-5
"""Of all three measures; clipping must be active, or the comparison means little."""
ENGINES: tuple[tuple[str, int], ...] = (
    ("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3),
)  # fmt: skip
"""Engine and ZeRO stage."""


@dataclass(frozen=True)
class Case:
    """One engine on one layout of the ranks; what neither tensor nor sequence takes is data parallel."""

    engine: str
    zero_stage: int
    tensor: int = 1
    sequence: int = 1
    stage: Stage = "sequential"
    checkpointing: Checkpointing = "none"

    def __str__(self) -> str:
        name = "torch" if self.engine == "torch" else f"deepspeed ZeRO {self.zero_stage}"
        data = dist.get_world_size() // (self.tensor * self.sequence)
        layout = f"tensor {self.tensor} x sequence {self.sequence} x data {data}"
        return f"{name:16} {layout}, {self.stage}, checkpointing {self.checkpointing}"


@dataclass(frozen=True)
class Difference:
    """One case against the plain engine on one rank."""

    case: Case
    loss: float
    """Largest |a - b| / |b| over all steps."""
    grad_norm: float
    weights: float
    """|a - b| / |b - start| over all trained weights after the last step."""
    clipped: bool
    """Clipping was active in every step."""

    @property
    def accepted(self) -> bool:
        return self.clipped and max(self.loss, self.grad_norm, self.weights) < TOLERANCE


@dataclass(frozen=True)
class Trained:
    """What a training leaves."""

    numbers: list[tuple[float, float]]
    """Loss and gradient norm of every step."""
    start: Tensor
    """All trained weights, whole and in one vector, before the first step."""
    end: Tensor
    """The same after the last step."""


def small_config(
    engine: str, zero_stage: int, tensor: int, steps: int, precision: str = "fp32", stage: Stage = "sequential",
    sequence: int = 1, checkpointing: Checkpointing = "none",
) -> Config:  # fmt: skip
    """A run of one stage: two layers, width 32, 8 heads, 4 x 4 codes per frame, 8 text tokens."""
    model = {
        "num_layers": 2, "hidden_size": 32, "num_heads": 8, "grid": (4, 4), "text_length": 8, "text_positions": 8,
        "image_vocab_size": 21, "text_vocab_size": 17, "boi_id": 3, "inherit": "none",
    }  # fmt: skip
    train = {
        "stage": stage, "run_dir": "none", "engine": engine, "zero_stage": zero_stage, "steps": steps,
        "global_batch_size": GLOBAL_BATCH, "micro_batch_size": MICRO_BATCH, "precision": precision,
        "learning_rate": 2e-4, "warmup_steps": 5, "gradient_clip": CLIP, "weight_decay": 0.01,
        "activation_checkpointing": checkpointing,
    }  # fmt: skip
    # Small tensors would otherwise stay whole under ZeRO 3, and nothing would be compared.
    partition_all = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return Config.model_validate(
        {
            "model": model,
            "tokenizer": {"text": "none", "frames": "none"},
            "train": train,
            "parallel": {"tensor": tensor, "sequence": sequence},
            "deepspeed": partition_all if zero_stage == 3 else {},
        }
    )


def small_engine(config: Config, groups: ProcessGroups) -> Engine:
    """An engine over the small model, initialized the same for every number of ranks."""
    stage = config.train.stage
    plus = () if stage == "base" else (stage,)
    checkpointing = config.train.activation_checkpointing
    model = CogVideo(config.model, plus, groups.tensor, checkpointing, sequence=groups.sequence)
    initialize_base(model, seed=1)
    if stage != "base":
        initialize_plus(model, stage, "copy", seed=1)
    model.trainable(stage)
    return build_engine(config, model, groups, GLOBAL_BATCH // (MICRO_BATCH * groups.data_size))


def run_step(engine: Engine, config: Config, groups: ProcessGroups, step: int) -> tuple[float, float]:
    """One optimizer step (from 1) on data that depends on the step only; mean loss and gradient norm."""
    text_BL, valid_BL, codes_BTP = small_batch(config.model, config.train.stage, step)
    accumulation = GLOBAL_BATCH // (MICRO_BATCH * groups.data_size)
    mean = torch.zeros(())
    for micro in range(accumulation):
        first = (micro * groups.data_size + groups.data_rank) * MICRO_BATCH
        rows = slice(first, first + MICRO_BATCH)
        output = engine.forward(
            text_BL=text_BL[rows], text_valid_BL=valid_BL[rows], frames_BTP=codes_BTP[rows], stage=config.train.stage
        )
        engine.backward(output.loss)
        mean += output.loss.detach() / accumulation
    engine.step(learning_rate(step, config.train))
    if groups.replicas.size > 1:
        dist.all_reduce(mean, group=groups.replicas.group)
        mean /= groups.replicas.size
    return float(mean), engine.grad_norm


def train(config: Config, groups: ProcessGroups) -> Trained:
    """Train the small model."""
    engine = small_engine(config, groups)
    start = _trained_weights(engine, groups)
    numbers = [run_step(engine, config, groups, step) for step in range(1, config.train.steps + 1)]
    return Trained(numbers, start, _trained_weights(engine, groups))


def _trained_weights(engine: Engine, groups: ProcessGroups) -> Tensor:
    named = [(name, parameter) for name, parameter in engine.model.named_parameters() if parameter.requires_grad]
    return torch.cat([gather_whole(engine.weight(name), p, groups.tensor).double().flatten() for name, p in named])


def all_cases(layouts: Sequence[tuple[int, int]], stages: Sequence[Stage]) -> list[Case]:
    """Every engine on every layout (tensor, sequence), but for ZeRO 3 with tensor parallelism, which is refused."""
    found = [
        Case(*engine, tensor, sequence, stage)
        for stage, (tensor, sequence), engine in itertools.product(stages, layouts, ENGINES)
    ]
    return [case for case in found if case.zero_stage < 3 or case.tensor == 1]


def compare(cases: Sequence[Case], steps: int) -> Iterator[Difference]:
    """Each case on these ranks against the plain engine on one rank. Collective."""
    expected = {stage: _on_one_rank(steps, stage) for stage in dict.fromkeys(case.stage for case in cases)}
    for case in cases:
        config = small_config(
            case.engine, case.zero_stage, case.tensor, steps, stage=case.stage, sequence=case.sequence,
            checkpointing=case.checkpointing,
        )  # fmt: skip
        theirs = expected[case.stage]
        ours = train(config, build_process_groups(case.tensor, case.sequence))
        numbers, right = np.array(ours.numbers), np.array(theirs.numbers)
        loss, norm = (np.abs(numbers - right) / np.abs(right)).max(axis=0).tolist()  # NaN stays NaN
        weights = float((ours.end - theirs.end).norm() / (theirs.end - theirs.start).norm())
        yield Difference(case, loss, norm, weights, all(norm > CLIP for _, norm in theirs.numbers))


def _on_one_rank(steps: int, stage: Stage) -> Trained:
    """What rank 0 alone trains, told to all."""
    found: list[Trained | None] = [None]
    if dist.get_rank() == 0:
        found = [train(small_config("torch", 0, 1, steps, stage=stage), ProcessGroups())]
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def small_batch(model: ModelConfig, stage: Stage, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Text, its validity and codes of one step's global batch."""
    generator = torch.Generator().manual_seed(step % 10)  # ten batches, again and again: something to learn
    grid = stage_layout(model, stage).grid
    text_BL = torch.randint(0, model.text_vocab_size, (GLOBAL_BATCH, model.text_length), generator=generator)
    valid_BL = torch.ones_like(text_BL, dtype=torch.bool)
    valid_BL[::2, : model.text_length // 2] = False
    codes = (GLOBAL_BATCH, grid.frames, grid.cells)
    return text_BL, valid_BL, torch.randint(0, model.image_vocab_size, codes, generator=generator)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prove.py engines`: start the ranks, or be one of them; returns 0 if all differences are within 1e-5."""
    parser = argparse.ArgumentParser(prog="prove.py engines", description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tensor", type=int, nargs="*", default=[1, 2], help="tensor-parallel sizes")
    parser.add_argument("--sequence", type=int, nargs="*", default=[2], help="sequence-parallel sizes")
    stages = ["base", "sequential", "interpolation"]
    parser.add_argument("--stage", choices=stages, nargs="+", default=["sequential"])
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ:
        return _start_ranks(arguments)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    layouts = [(tensor, 1) for tensor in arguments.tensor] + [(1, sequence) for sequence in arguments.sequence]
    accepted = True
    for row in compare(all_cases(layouts, arguments.stage), arguments.steps):
        accepted &= row.accepted
        _print_on_rank_0(
            f"{row.case}: losses {row.loss:.1e}, gradient norms {row.grad_norm:.1e}, weights {row.weights:.1e}"
        )
    _print_on_rank_0(
        f"{'all' if accepted else 'NOT all'} within {TOLERANCE} of the plain engine on one rank over "
        f"{arguments.steps} steps (relative differences)"
    )
    dist.destroy_process_group()
    return 0 if accepted else 1


def _start_ranks(arguments: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arguments.ranks)]
    command += ["-m", "megacog.training.comparison", "--steps", str(arguments.steps), "--stage", *arguments.stage]
    command += ["--tensor", *map(str, arguments.tensor), "--sequence", *map(str, arguments.sequence)]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run(command, env=environment, check=False).returncode


def _print_on_rank_0(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    run(main)
