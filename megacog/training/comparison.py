"""Proof that all engines are the same optimizer: the same small model and data through each, step by step.

The measure is the largest relative difference of losses and gradient norms against the plain engine on
one rank. Used by the tests, too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from megacog.config.schema import Config, ModelConfig, Stage
from megacog.model.init import initialize_base, initialize_plus
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog.parallel.groups import ProcessGroups, build_process_groups
from megacog.parallel.tensor import TensorParallel
from megacog.runtime.cli import run
from megacog.training.engine import Engine, build_engine
from megacog.training.schedule import learning_rate

GLOBAL_BATCH, MICRO_BATCH = 8, 2
CLIP = 0.01
TOLERANCE = 1e-5
"""Of losses and gradient norms, relative; clipping must be active, or the comparison means little."""
ENGINES: tuple[tuple[str, int], ...] = (
    ("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3),
)  # fmt: skip
"""Engine and ZeRO stage."""


@dataclass(frozen=True)
class Difference:
    """One engine against the plain engine on one rank."""

    engine: str
    tensor: int
    """Tensor-parallel ranks."""
    loss: float
    """Largest |a - b| / |b| over all steps."""
    grad_norm: float
    clipped: bool
    """Clipping was active in every step."""

    @property
    def accepted(self) -> bool:
        return self.clipped and self.loss < TOLERANCE and self.grad_norm < TOLERANCE


def small_config(
    engine: str, zero_stage: int, tensor: int, steps: int, precision: str = "fp32", stage: Stage = "sequential"
) -> Config:
    """A run of one stage: two layers, width 32, 4 x 4 codes per frame, 8 text tokens."""
    model = {
        "num_layers": 2, "hidden_size": 32, "num_heads": 4, "grid": (4, 4), "text_length": 8, "text_positions": 8,
        "image_vocab_size": 21, "text_vocab_size": 17, "boi_id": 3, "inherit": "none",
    }  # fmt: skip
    train = {
        "stage": stage, "run_dir": "none", "engine": engine, "zero_stage": zero_stage, "steps": steps,
        "global_batch_size": GLOBAL_BATCH, "micro_batch_size": MICRO_BATCH, "precision": precision,
        "learning_rate": 2e-4, "warmup_steps": 5, "gradient_clip": CLIP, "weight_decay": 0.01,
    }  # fmt: skip
    # Small tensors would otherwise stay whole under ZeRO 3, and nothing would be compared.
    partition_all = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return Config.model_validate(
        {
            "model": model,
            "tokenizer": {"text": "none", "frames": "none"},
            "train": train,
            "parallel": {"tensor": tensor},
            "deepspeed": partition_all if zero_stage == 3 else {},
        }
    )


def small_engine(config: Config, groups: ProcessGroups) -> Engine:
    """An engine over the small model, initialized the same for every number of ranks."""
    stage = config.train.stage
    model = CogVideo(config.model, () if stage == "base" else (stage,), groups.tensor)
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
    if groups.data_size > 1:
        dist.all_reduce(mean, group=groups.data_group)
        mean /= groups.data_size
    return float(mean), engine.grad_norm


def train(config: Config, groups: ProcessGroups) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    engine = small_engine(config, groups)
    return [run_step(engine, config, groups, step) for step in range(1, config.train.steps + 1)]


def compare_engines(tensor_sizes: Iterable[int], steps: int, stage: Stage = "sequential") -> Iterator[Difference]:
    """Every engine on these ranks against the plain engine on one rank (which each rank runs for itself)."""
    expected = train(small_config("torch", 0, 1, steps, stage=stage), ProcessGroups(TensorParallel(), 0, 1, None))
    theirs, clipped = np.array(expected), all(norm > CLIP for _, norm in expected)
    for tensor in tensor_sizes:
        groups = build_process_groups(tensor)
        for engine, zero_stage in ENGINES:
            ours = np.array(train(small_config(engine, zero_stage, tensor, steps, stage=stage), groups))
            loss, norm = (np.abs(ours - theirs) / np.abs(theirs)).max(axis=0).tolist()  # NaN stays NaN
            name = "torch" if engine == "torch" else f"deepspeed ZeRO {zero_stage}"
            yield Difference(name, tensor, loss, norm, clipped)


def small_batch(model: ModelConfig, stage: Stage, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
    parser.add_argument("--tensor", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes")
    parser.add_argument("--stage", choices=["base", "sequential", "interpolation"], default="sequential")
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ:
        return _start_ranks(arguments)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    accepted, ranks = True, dist.get_world_size()
    for row in compare_engines(arguments.tensor, arguments.steps, arguments.stage):
        accepted &= row.accepted
        _print_on_rank_0(
            f"{row.engine:18} tensor {row.tensor} x data {ranks // row.tensor}, {arguments.steps} steps: "
            f"largest relative difference of losses {row.loss:.1e}, of gradient norms {row.grad_norm:.1e}"
        )
    _print_on_rank_0(f"{'all within' if accepted else 'NOT within'} {TOLERANCE} of the plain engine on one rank")
    dist.destroy_process_group()
    return 0 if accepted else 1


def _start_ranks(arguments: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arguments.ranks)]
    command += ["-m", "megacog.training.comparison", "--steps", str(arguments.steps), "--stage", arguments.stage]
    command += ["--tensor", *map(str, arguments.tensor)]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run(command, env=environment, check=False).returncode


def _print_on_rank_0(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    run(main)
