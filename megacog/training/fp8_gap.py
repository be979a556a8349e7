"""Proof that a base in e4m3 trains as one in bf16 does: losses on fixed data, against their spread over seeds.

A small base is trained on clips that count (in time by a step that the text names, in space by a hidden one, with
noise). Then an attention-plus is trained on it, frozen, for every seed twice: with the base in bf16 and in e4m3. A seed
decides the initial `dense` of the attention-plus and the order of the data; both runs of a seed share them. The
measure is the loss on clips that no run trains on.

Legend: B samples, L text length, T frames, P cells.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacog.checkpoint.export import load_tensors
from megacog.config.schema import BasePrecision, Config, Stage
from megacog.model.init import initialize_base, initialize_plus
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog.parallel.fp8 import hold_in_fp8
from megacog.parallel.groups import ProcessGroups
from megacog.parallel.tensor import materialize
from megacog.training.engine import Engine, build_engine
from megacog.training.schedule import learning_rate

ALLOWED_SPREADS = 2.0
"""Standard deviations of the bf16 losses over seeds."""
_ALONE = ProcessGroups()
_BATCH, _EVALUATION = 8, 64
_CODES, _STEPS, _STRIDES, _NOISE = 48, 8, 3, 0.1
"""Codes, steps in time and in space, share of codes that are random."""


@dataclass(frozen=True)
class Gap:
    """Final losses of every seed."""

    bf16: list[float]
    fp8: list[float]

    @property
    def spread(self) -> float:
        """Standard deviation of the bf16 losses."""
        return statistics.stdev(self.bf16)

    @property
    def largest(self) -> float:
        """Largest difference between the two runs of a seed."""
        return max(abs(a - b) for a, b in zip(self.fp8, self.bf16, strict=True))

    @property
    def accepted(self) -> bool:
        return self.largest <= ALLOWED_SPREADS * self.spread


def gap_config(stage: Stage, steps: int, base_precision: BasePrecision | None) -> Config:
    """Two layers, width 64, 4 x 4 codes per frame."""
    model = {
        "num_layers": 2, "hidden_size": 64, "num_heads": 4, "grid": (4, 4), "text_length": 4, "text_positions": 4,
        "image_vocab_size": _CODES, "text_vocab_size": _STEPS + 2, "boi_id": 0, "inherit": "none",
        "init": {"weight_std": 0.08, "embedding_std": 0.5, "residual_norm": 0.5},
    }  # fmt: skip
    train = {
        "stage": stage, "run_dir": "none", "engine": "torch", "steps": steps, "global_batch_size": _BATCH,
        "micro_batch_size": _BATCH, "precision": "bf16", "base_precision": base_precision, "learning_rate": 3e-3,
        "warmup_steps": min(20, steps), "gradient_clip": 1.0,
    }  # fmt: skip
    return Config.model_validate({"model": model, "tokenizer": {"text": "none", "frames": "none"}, "train": train})


def clips(config: Config, count: int, seed: int) -> dict[str, Tensor]:
    """Forward arguments of `count` clips that count modulo the number of codes."""
    generator = torch.Generator().manual_seed(seed)
    grid = stage_layout(config.model, config.train.stage).grid

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (count, *shape), generator=generator)

    start_B, step_B, stride_B = draw(0, _CODES), draw(1, _STEPS + 1), draw(1, _STRIDES + 1)
    time_T, place_P = torch.arange(grid.frames), torch.arange(grid.cells)
    codes_BTP = start_B[:, None, None] + step_B[:, None, None] * time_T[:, None] + stride_B[:, None, None] * place_P
    noisy_BTP = torch.rand(count, grid.frames, grid.cells, generator=generator) < _NOISE
    codes_BTP = torch.where(noisy_BTP, draw(0, _CODES, grid.frames, grid.cells), codes_BTP % _CODES)
    text_BL = step_B[:, None].expand(-1, config.model.text_length).contiguous()
    return {"text_BL": text_BL, "text_valid_BL": torch.ones_like(text_BL, dtype=torch.bool), "frames_BTP": codes_BTP}


def train(engine: Engine, config: Config, seed: int) -> float:
    """Runs all steps; the loss on fixed clips afterwards."""
    stage = config.train.stage
    engine.model.train()
    for step in range(1, config.train.steps + 1):
        inputs = clips(config, _BATCH, seed=(seed + 1) * 1_000_003 + step)
        engine.backward(engine.forward(**inputs, stage=stage).loss)
        engine.step(learning_rate(step, config.train))
    engine.model.eval()
    with torch.no_grad():
        return float(engine.forward(**clips(config, _EVALUATION, seed=0), stage=stage).loss)


def trained_base(steps: int) -> CogVideo:
    """A base that knows single frames, in bf16."""
    config = gap_config("base", steps, None)
    model = CogVideo(config.model)
    initialize_base(model, seed=1)
    model.trainable("base")
    train(build_engine(config, model, _ALONE, 1), config, seed=0)
    return model


def run(base: CogVideo, steps: int, seed: int, precision: BasePrecision | None) -> float:
    """Final loss of one attention-plus on that base."""
    config = gap_config("sequential", steps, precision)
    with torch.device("meta"):
        model = CogVideo(config.model, ("sequential",))
    model.trainable("sequential")
    if precision == "fp8":
        hold_in_fp8(model.layers)
    materialize(model, "cpu", torch.bfloat16)
    load_tensors(model, base.get_parameter, [name for name, _ in base.named_parameters()])
    initialize_plus(model, "sequential", "random", seed, base.get_parameter)
    return train(build_engine(config, model, _ALONE, 1), config, seed)


def measure(steps: int, base_steps: int, seeds: int) -> Gap:
    """Losses of `seeds` attention-plus sets on one base, held either way."""
    base = trained_base(base_steps)
    losses = {precision: [run(base, steps, seed, precision) for seed in range(seeds)] for precision in (None, "fp8")}
    return Gap(losses[None], losses["fp8"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prove.py fp8`; returns 0 if every seed's gap is within twice the spread of bf16, else 1."""
    parser = argparse.ArgumentParser(prog="prove.py fp8", description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of every attention-plus (default: 300)")
    parser.add_argument("--base-steps", type=int, default=300, help="of the base (default: 300)")
    parser.add_argument("--seeds", type=int, default=4, help="at least 2 (default: 4)")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 2:
        parser.error("a spread needs at least 2 seeds")
    gap = measure(arguments.steps, arguments.base_steps, arguments.seeds)
    print(f"{'seed':>4}{'base in bf16':>16}{'base in e4m3':>16}{'difference':>14}")
    for seed, (bf16, fp8) in enumerate(zip(gap.bf16, gap.fp8, strict=True)):
        print(f"{seed:4}{bf16:16.4f}{fp8:16.4f}{fp8 - bf16:+14.4f}")
    print(f"loss after {arguments.steps} steps on fixed clips: bf16 {statistics.mean(gap.bf16):.4f} ", end="")
    print(f"(spread over seeds {gap.spread:.4f}), e4m3 {statistics.mean(gap.fp8):.4f}")
    verdict = "within" if gap.accepted else "NOT within"
    print(f"largest difference of a seed {gap.largest:.4f}: {verdict} {ALLOWED_SPREADS:g} x spread")
    return 0 if gap.accepted else 1
