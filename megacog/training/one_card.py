"""Proof that a run trains within a given memory: its own model, engine and micro batch, on random weights and codes.

    python launch/prove.py fits [--config configs/cogvideo-9b-single-48gb.yaml] [--gib 44] [key=value ...]

On a GPU torch may take no more than --gib, whatever the card has; a run that needs more fails as it would on a smaller
card. Two optimizer steps of two micro batches each: after the first one all states exist. Needs no data and writes
nothing. On a CPU the same program runs without a limit, for small models.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megacog.checkpoint.export import load_tensors
from megacog.config.load import load_config
from megacog.config.schema import Config
from megacog.errors import EnvError
from megacog.model.init import whole_shape
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog.parallel.fp8 import check_device, hold_in_fp8
from megacog.parallel.groups import build_process_groups
from megacog.parallel.tensor import materialize
from megacog.runtime.hardware import describe_device, memory_gib
from megacog.runtime.ranks import discover
from megacog.training.engine import Engine, build_engine
from megacog.training.precision import DTYPES
from megacog.training.pretrain import start_processes

GIB = 44.0
"""What a card of 48 GB leaves to torch when CUDA has taken its own."""
_ACCUMULATION, _STEPS = 2, 2
_STD = 0.02


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prove.py fits`; returns 0 if all steps were made within the limit."""
    parser = argparse.ArgumentParser(
        prog="prove.py fits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/cogvideo-9b-single-48gb.yaml"))
    parser.add_argument("--gib", type=float, default=GIB, help=f"memory of the GPU that may be used (default: {GIB:g})")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override a key of the config")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    batch = config.train.micro_batch_size * _ACCUMULATION
    config = load_config(arguments.config, [*arguments.overrides, f"train.global_batch_size={batch}"])
    device = start_processes(config, discover())
    try:
        limited = limit(device, arguments.gib)
        print(f"{describe_device()}, {limited}", flush=True)
        train(config, device)
    except torch.cuda.OutOfMemoryError as error:
        print(f"does not fit: {str(error).splitlines()[0]}")
        return 1
    finally:
        dist.destroy_process_group()
    return 0


def limit(device: torch.device, gib: float) -> str:
    """Let torch take no more than `gib` of the device; says so in words.

    Raises:
        EnvError: The device has less.
    """
    if device.type != "cuda":
        return "without a limit on this device"
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    if gib > total:
        raise EnvError(f"--gib {gib:g} is more than the {total:.1f} GiB of {torch.cuda.get_device_name(device)}")
    torch.cuda.set_per_process_memory_fraction(gib / total, device)
    return f"of which {gib:g} GiB may be used"


def train(config: Config, device: torch.device) -> None:
    """Make all steps and say what each took."""
    engine = random_engine(config, device)
    inputs = random_inputs(config, device)
    print(f"engine ready: peak {memory_gib():.2f} GiB", flush=True)
    for step in range(1, _STEPS + 1):
        start = time.perf_counter()
        for _ in range(_ACCUMULATION):
            output = engine.forward(**inputs, stage=config.train.stage)
            engine.backward(output.loss)
        applied = engine.step(config.train.learning_rate)
        loss, seconds = float(output.loss.detach()), time.perf_counter() - start
        if not applied:
            raise EnvError(f"step {step}: gradients are not finite")
        print(
            f"step {step}: {_ACCUMULATION} micro batches of {config.train.micro_batch_size}, loss {loss:.3f}, "
            f"{seconds:.2f} s, peak {memory_gib():.2f} GiB",
            flush=True,
        )


def random_engine(config: Config, device: torch.device) -> Engine:
    """The run's engine over its own kind of model, weights drawn one at a time."""
    stage = config.train.stage
    if config.model.boi_id is None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"boi_id": 0})})
    groups = build_process_groups(config.parallel.tensor)
    policy, kernels = config.train.activation_checkpointing, config.train.kernels
    with torch.device("meta"):
        model = CogVideo(config.model, () if stage == "base" else (stage,), groups.tensor, policy, kernels)
    model.trainable(stage)
    if config.train.base_precision == "fp8":
        check_device(device)
        hold_in_fp8(model.layers)
    materialize(model, device, DTYPES[config.train.precision])
    model.choose_kernels()
    shapes = {name: whole_shape(parameter, groups.tensor.size) for name, parameter in model.named_parameters()}

    def draw(name: str) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shapes[name], device=device)
        if "layernorm" in name:
            return torch.ones(shapes[name], device=device)
        return _STD * torch.randn(shapes[name], device=device)

    load_tensors(model, draw, shapes)
    return build_engine(config, model.train(), groups, _ACCUMULATION)


def random_inputs(config: Config, device: torch.device) -> dict[str, Tensor]:
    """One micro batch of random codes under random texts."""
    grid, batch = stage_layout(config.model, config.train.stage).grid, config.train.micro_batch_size
    text_BL = torch.randint(0, config.model.text_vocab_size, (batch, config.model.text_length), device=device)
    codes = (batch, grid.frames, grid.cells)
    return {
        "text_BL": text_BL,
        "text_valid_BL": torch.ones_like(text_BL, dtype=torch.bool),
        "frames_BTP": torch.randint(0, config.model.image_vocab_size, codes, device=device),
    }
