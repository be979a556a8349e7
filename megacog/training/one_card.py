"""Proof that a run trains within a given memory: its own model, engine and micro batch, on random weights and codes.

    python launch/prove.py fits [--config configs/cogvideo-9b-single-48gb.yaml] [--gib 42.9] [key=value ...]

On a GPU torch may take no more than --gib, whatever the card has; a run that needs more fails as it would on a smaller
card. Two optimizer steps of two micro batches each: after the first one all states exist. Needs no data and writes
nothing. On a CPU the same program runs without a limit, for small models.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megacog.config.load import load_config
from megacog.config.schema import Config
from megacog.errors import EnvError
from megacog.parallel.groups import build_process_groups
from megacog.runtime.hardware import describe_device, memory_gib
from megacog.runtime.ranks import discover
from megacog.training.pretrain import start_processes
from megacog.training.synthetic import random_engine, random_inputs

GIB = 42.9
"""What a card of 48 GB leaves to torch: it reports 44.4 GiB, of which the planner reserves 1.5 (docs/scaling.md)."""
_ACCUMULATION, _STEPS = 2, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prove.py fits`; returns 0 if all steps were made within the limit."""
    parser = argparse.ArgumentParser(
        prog="prove.py fits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/cogvideo-9b-single-48gb.yaml"))
    parser.add_argument("--gib", type=float, default=GIB, help=f"memory of the GPU that may be used (default: {GIB:g})")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override a key of the config")
    arguments = parser.parse_intermixed_args(argv)
    config = fitting_config(arguments.config, arguments.overrides)
    if config.train.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise EnvError(
            "this run's engine is DeepSpeed, which is not installed here: pip install deepspeed, or carry its wheel to "
            "a machine without network (launch/fetch_wheels.sh)"
        )
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


def fitting_config(path: Path, overrides: Sequence[str]) -> Config:
    """The run with two micro batches per step, to start from a random base instead of the export that it inherits."""
    config = load_config(path, overrides)
    batch, stage = config.train.micro_batch_size * _ACCUMULATION, config.train.stage
    own = [
        f"train.global_batch_size={batch}", f"model.inherit={'null' if stage == 'base' else 'none'}",
        "model.plus_from=base", f"model.boi_id={config.model.boi_id or 0}",
    ]  # fmt: skip
    return load_config(path, [*overrides, *own])


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
    groups = build_process_groups(config.parallel.tensor, config.parallel.sequence)
    engine = random_engine(config, device, groups)
    inputs = random_inputs(config, device)
    print(f"engine ready: peak {memory_gib():.2f} GiB", flush=True)
    for step in range(1, _STEPS + 1):
        start = time.perf_counter()
        for _ in range(_ACCUMULATION):
            output = engine.forward(**inputs)
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
