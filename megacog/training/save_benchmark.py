"""How long training stands still for a checkpoint, written while it goes on or at once.

A base with a wide vocabulary trains on one rank with the plain engine: many weights, little work, so that writing is
the larger part. The same steps run without checkpoints, with asynchronous and with synchronous ones, in turn. Two
measures per checkpoint: how long the step's thread was held up, and how much longer the run took altogether, which
counts what the writer takes from the steps (cores, memory, disk), too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megacog.config.schema import Config
from megacog.model.init import initialize_base
from megacog.model.transformer import CogVideo
from megacog.parallel.groups import build_process_groups
from megacog.runtime.cli import run
from megacog.runtime.hardware import available_cores, describe_device
from megacog.training.comparison import GLOBAL_BATCH, run_step
from megacog.training.engine import build_engine
from megacog.training.state import RunState, shapes_of

MODES: dict[str, bool | None] = {"none": None, "asynchronous": True, "synchronous": False}
"""Name -> `checkpoint.asynchronous`."""
_WIDTH = 256
_BYTES_PER_PARAMETER = 12
"""Of a record in fp32: weight and both moments."""


@dataclass(frozen=True)
class Measured:
    """One run."""

    seconds: float
    """Of all steps and checkpoints."""
    stalls: list[float]
    """Seconds that each checkpoint held the steps up."""
    written: list[float]
    """Seconds from each checkpoint's step to its name."""
    bytes: int
    """Of one checkpoint."""


def wide_config(megabytes: int, steps: int, run_dir: Path, asynchronous: bool) -> Config:
    """A base whose checkpoint has about `megabytes`."""
    vocabulary = max(64, megabytes * 10**6 // (_BYTES_PER_PARAMETER * _WIDTH))
    model = {
        "num_layers": 1, "hidden_size": _WIDTH, "num_heads": 4, "grid": (4, 4), "text_length": 8, "text_positions": 8,
        "image_vocab_size": 64, "text_vocab_size": vocabulary, "boi_id": 3,
    }  # fmt: skip
    train = {
        "stage": "base", "run_dir": str(run_dir), "engine": "torch", "steps": steps, "precision": "fp32",
        "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2, "warmup_steps": 1,
    }  # fmt: skip
    tokenizer = {"text": "none", "frames": "none"}
    checkpoint = {"keep_last": 1, "asynchronous": asynchronous}
    return Config.model_validate({"model": model, "tokenizer": tokenizer, "train": train, "checkpoint": checkpoint})


def measure(megabytes: int, steps: int, every: int, folder: Path, asynchronous: bool | None) -> Measured:
    """Train `steps` steps with a checkpoint every `every`; `asynchronous` None = without any."""
    config = wide_config(megabytes, steps, folder, bool(asynchronous))
    groups = build_process_groups(1)
    model = CogVideo(config.model)
    initialize_base(model, seed=1)
    model.trainable("base")
    shapes = shapes_of(model)
    engine = build_engine(config, model, groups, GLOBAL_BATCH // 2)
    state = RunState(config, engine, groups, shapes, {}, {}, (None, []))
    run_step(engine, config, groups, 1)
    if asynchronous is not None:
        state.save(1)  # memory is touched for the first time, and a first checkpoint is there to be removed
    stalls, written, size = [], [], 0

    def note() -> None:
        nonlocal size
        saved = state.finish_save()
        if saved is not None:
            stalls.append(saved.stall_seconds)
            written.append(saved.seconds)
            size = saved.bytes

    started = time.perf_counter()
    for step in range(2, steps + 2):
        run_step(engine, config, groups, step)
        if not state.writing:
            note()
        if asynchronous is not None and step % every == 0:
            note()
            state.start_save(step)
            if not asynchronous:
                note()
    note()
    seconds = time.perf_counter() - started
    state.close()
    return Measured(seconds, stalls, written, size)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table; 0 if asynchronous checkpoints hold steps up for at most 5 % of synchronous ones."""
    parser = argparse.ArgumentParser(prog="benchmark.py checkpoint", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=300, help="of one checkpoint (default: 300)")
    parser.add_argument("--steps", type=int, default=60, help="of every run (default: 60)")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints (default: 20)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each kind, in turn (default: 3)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of the steps (default: all cores)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    runs: dict[str, list[Measured]] = {name: [] for name in MODES}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for _ in range(arguments.repeat):
            for name, asynchronous in MODES.items():
                place = Path(folder, name)
                runs[name].append(measure(arguments.megabytes, arguments.steps, arguments.every, place, asynchronous))
                shutil.rmtree(place)
    dist.destroy_process_group()
    return _report(runs, arguments)


def _report(runs: dict[str, list[Measured]], arguments: argparse.Namespace) -> int:
    bare = statistics.median(one.seconds for one in runs["none"])
    count = arguments.steps // arguments.every
    size = runs["synchronous"][0].bytes / 1e6
    print(
        f"{describe_device()}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}: "
        f"{size:.0f} MB per checkpoint, every {arguments.every} steps of {bare / arguments.steps:.3f} s"
    )
    print(f"{'medians, seconds':16}{'held up':>12}{'run longer':>12}{'step to name':>14}{'MB/s':>8}")
    held = {}
    for name in ("synchronous", "asynchronous"):
        rows = runs[name]
        held[name] = statistics.median(stall for one in rows for stall in one.stalls)
        longer = (statistics.median(one.seconds for one in rows) - bare) / count
        written = statistics.median(seconds for one in rows for seconds in one.written)
        print(f"{name:16}{held[name]:12.4f}{longer:12.4f}{written:14.3f}{rows[0].bytes / 1e6 / written:8.0f}")
    share = held["asynchronous"] / held["synchronous"]
    print(f"asynchronous checkpoints hold the steps up for {100 * share:.1f} % of the time of synchronous ones")
    return 0 if share <= 0.05 else 1


if __name__ == "__main__":
    run(main)
