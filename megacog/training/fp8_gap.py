"""Proof that a base in e4m3 trains as one in bf16 does: losses on fixed data, against their spread over seeds.

A base is trained on clips that count (in time by a step that the text names, in space by a hidden one, with noise).
Then an attention-plus is trained on it, frozen, for every seed twice: with the base in bf16 and in e4m3. A seed
decides the initial `dense` of the attention-plus and the order of the data; both runs of a seed share them. The
measure is the loss on clips that no run trains on.

On a CPU the model has 2 layers of width 64 and 4 x 4 codes per frame; on a GPU the depth, the width and the 20 x 20
codes of configs/cogvideo-125m.yaml.

Legend: B samples, L text length, T frames, P cells.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megacog.checkpoint.export import load_tensors
from megacog.config.schema import BasePrecision, Config, Stage
from megacog.model.init import initialize_base, initialize_plus
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog.parallel.fp8 import check_device, hold_in_fp8
from megacog.parallel.groups import ProcessGroups
from megacog.parallel.tensor import materialize
from megacog.runtime.files import write_json
from megacog.runtime.hardware import describe_device, usable_device
from megacog.training.engine import Engine, build_engine
from megacog.training.schedule import learning_rate

ALLOWED_SPREADS = 2.0
"""Standard deviations of the bf16 losses over seeds."""
_ALONE = ProcessGroups()
_CPU = torch.device("cpu")
_BATCH, _EVALUATION = 8, 64
_CODES, _STEPS, _STRIDES, _NOISE = 48, 8, 3, 0.1
"""Codes, steps in time and in space, share of codes that are random."""


@dataclass(frozen=True)
class Size:
    """How large the model is, and for how long it is trained by default."""

    layers: int
    width: int
    heads: int
    side: int
    """A frame has side x side codes."""
    learning_rate: float
    steps: int
    base_steps: int
    seeds: int

    @property
    def init(self) -> dict[str, float]:
        """Matrices and tables that start logits alike at every width."""
        root = math.sqrt(self.width)
        return {"weight_std": 0.64 / root, "embedding_std": 4.0 / root, "residual_norm": 0.5}


SMALL = Size(layers=2, width=64, heads=4, side=4, learning_rate=3e-3, steps=300, base_steps=300, seeds=4)
LARGE = Size(layers=10, width=640, heads=10, side=20, learning_rate=6e-4, steps=250, base_steps=250, seeds=3)


@dataclass(frozen=True)
class Gap:
    """Final losses of every seed so far."""

    bf16: list[float] = field(default_factory=list)
    fp8: list[float] = field(default_factory=list)

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


def gap_config(stage: Stage, steps: int, base_precision: BasePrecision | None, size: Size = SMALL) -> Config:
    """A run of one stage."""
    model = {
        "num_layers": size.layers, "hidden_size": size.width, "num_heads": size.heads, "grid": (size.side, size.side),
        "text_length": 4, "text_positions": 4, "image_vocab_size": _CODES, "text_vocab_size": _STEPS + 2, "boi_id": 0,
        "inherit": "none", "init": size.init,
    }  # fmt: skip
    train = {
        "stage": stage, "run_dir": "none", "engine": "torch", "steps": steps, "global_batch_size": _BATCH,
        "micro_batch_size": _BATCH, "precision": "bf16", "base_precision": base_precision,
        "learning_rate": size.learning_rate, "warmup_steps": min(20, steps), "gradient_clip": 1.0,
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
    """Runs all steps; the loss on fixed clips afterwards, in batches as those of training."""
    stage, device = config.train.stage, engine.model.device

    def loss_of(inputs: dict[str, Tensor]) -> Tensor:
        return engine.forward(**{name: tensor.to(device) for name, tensor in inputs.items()}, stage=stage).loss

    engine.model.train()
    for step in range(1, config.train.steps + 1):
        inputs = clips(config, _BATCH, seed=(seed + 1) * 1_000_003 + step)
        engine.backward(loss_of(inputs))
        engine.step(learning_rate(step, config.train))
    engine.model.eval()
    fixed = clips(config, _EVALUATION, seed=0)
    parts = [{name: tensor[at : at + _BATCH] for name, tensor in fixed.items()} for at in range(0, _EVALUATION, _BATCH)]
    with torch.no_grad():
        return statistics.fmean(float(loss_of(part)) for part in parts)


def trained_base(steps: int, size: Size = SMALL, device: torch.device = _CPU) -> CogVideo:
    """A base that knows single frames, in bf16."""
    config = gap_config("base", steps, None, size)
    model = CogVideo(config.model)
    initialize_base(model, seed=1)
    model.trainable("base")
    model.to(device)
    train(build_engine(config, model, _ALONE, 1), config, seed=0)
    return model


def run(base: CogVideo, steps: int, seed: int, precision: BasePrecision | None, size: Size = SMALL) -> float:
    """Final loss of one attention-plus on that base, where the base is."""
    config = gap_config("sequential", steps, precision, size)
    with torch.device("meta"):
        model = CogVideo(config.model, ("sequential",))
    model.trainable("sequential")
    if precision == "fp8":
        hold_in_fp8(model.layers)
    materialize(model, base.device, torch.bfloat16)
    load_tensors(model, base.get_parameter, [name for name, _ in base.named_parameters()])
    initialize_plus(model, "sequential", "random", seed, base.get_parameter)
    return train(build_engine(config, model, _ALONE, 1), config, seed)


def measure(base: CogVideo, steps: int, seeds: int, size: Size = SMALL) -> Iterator[Gap]:
    """Losses of attention-plus sets on one base, held either way, after each seed."""
    gap = Gap()
    for seed in range(seeds):
        gap.bf16.append(run(base, steps, seed, None, size))
        gap.fp8.append(run(base, steps, seed, "fp8", size))
        yield gap


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prove.py fp8`; returns 0 if every seed's gap is within twice the spread of bf16, else 1."""
    parser = argparse.ArgumentParser(
        prog="prove.py fp8", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--steps", type=int, help=f"of every attention-plus ({_default('steps')})")
    parser.add_argument("--base-steps", type=int, help=f"of the base ({_default('base_steps')})")
    parser.add_argument("--seeds", type=int, help=f"at least 2 ({_default('seeds')})")
    parser.add_argument("--json", type=Path, help="also write the losses here, each seed's as they come")
    arguments = parser.parse_args(argv)
    device = torch.device(usable_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    check_device(device)
    size = SMALL if device.type == "cpu" else LARGE
    steps, seeds = arguments.steps or size.steps, arguments.seeds or size.seeds
    if seeds < 2:
        parser.error("a spread needs at least 2 seeds")
    base = trained_base(arguments.base_steps or size.base_steps, size, device)
    print(f"{describe_device()}; {size.layers} layers of width {size.width}, {size.side} x {size.side} codes per frame")
    print(f"{'seed':>4}{'base in bf16':>16}{'base in e4m3':>16}{'difference':>14}", flush=True)
    for seed, gap in enumerate(measure(base, steps, seeds, size)):
        bf16, fp8 = gap.bf16[-1], gap.fp8[-1]
        print(f"{seed:4}{bf16:16.4f}{fp8:16.4f}{fp8 - bf16:+14.4f}", flush=True)
        if arguments.json:
            write_json(arguments.json, {"device": describe_device(), **asdict(size), "steps": steps, **asdict(gap)})
    print(f"loss after {steps} steps on fixed clips: bf16 {statistics.mean(gap.bf16):.4f} ", end="")
    print(f"(spread over seeds {gap.spread:.4f}), e4m3 {statistics.mean(gap.fp8):.4f}")
    verdict = "within" if gap.accepted else "NOT within"
    print(f"largest difference of a seed {gap.largest:.4f}: {verdict} {ALLOWED_SPREADS:g} x spread")
    return 0 if gap.accepted else 1


def _default(name: str) -> str:
    return f"default: {getattr(SMALL, name)} on a CPU, {getattr(LARGE, name)} on a GPU"
