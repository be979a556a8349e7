"""How long training stands still for a checkpoint, written while it goes on or at once.

A base trains on one rank, on random samples. The same steps run without checkpoints, with asynchronous and with
synchronous ones, in turn. Two measures per checkpoint: how long the step's thread was held up, waiting before the next
update included, and how much longer the run took altogether, which counts what the writer takes from the steps
(cores, memory, disk), too. A configuration with more weights: `model.text_vocab_size=100000`.
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

from megacog.checkpoint.saver import Saved
from megacog.config.schema import Config
from megacog.parallel.groups import build_process_groups
from megacog.runtime.cli import run
from megacog.runtime.hardware import available_cores, describe_device
from megacog.runtime.ranks import discover
from megacog.training.benchmark import CPU_CONFIG
from megacog.training.engine import build_engine
from megacog.training.measure import Case, case_config
from megacog.training.pretrain import build_model
from megacog.training.state import RunState, shapes_of
from megacog.training.synthetic import random_inputs

MODES: dict[str, bool | None] = {"none": None, "asynchronous": True, "synchronous": False}
"""Name -> `checkpoint.asynchronous`."""

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


def measure(config: Config, steps: int, every: int, folder: Path, asynchronous: bool | None) -> Measured:
    """Train `steps` steps with a checkpoint every `every`; `asynchronous` None = without any."""
    device, groups = torch.device("cpu"), build_process_groups(1)
    checkpoint = config.checkpoint.model_copy(update={"keep_last": 1, "asynchronous": bool(asynchronous)})
    train = config.train.model_copy(update={"run_dir": str(folder)})
    config = config.model_copy(update={"train": train, "checkpoint": checkpoint})
    model, _, _ = build_model(config, groups, device, None, None)
    shapes = shapes_of(model)
    engine = build_engine(config, model, groups, accumulation=1)
    state = RunState(config, engine, groups, shapes, {}, {}, (None, []))
    inputs = random_inputs(config, device)

    def train_step() -> None:
        engine.backward(engine.forward(**inputs).loss)
        engine.step(1e-4)

    train_step()
    if asynchronous is not None:
        state.save(1)  # memory is touched for the first time, and a first checkpoint is there to be removed
    stalls, written, size = [], [], 0

    def note(saved: Saved | None) -> None:
        nonlocal size
        if saved is not None:
            stalls.append(saved.stall_seconds)
            written.append(saved.seconds)
            size = saved.bytes

    started = time.perf_counter()
    for step in range(2, steps + 2):
        train_step()
        if not state.writing:
            note(state.advance_save())
        if asynchronous is not None and step % every == every // 2:  # steps follow the last one, too
            note(state.finish_save())
            state.start_save(step)
            if not asynchronous:
                note(state.finish_save())
    note(state.finish_save())
    seconds = time.perf_counter() - started
    state.close()
    return Measured(seconds, stalls, written, size)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table; 0 if asynchronous checkpoints hold steps up for at most 5 % of synchronous ones."""
    parser = argparse.ArgumentParser(prog="benchmark.py checkpoint", description=__doc__)
    parser.add_argument("--config", type=Path, default=CPU_CONFIG, help="run to take the model from")
    parser.add_argument("--engine", choices=["torch", "deepspeed"], default="deepspeed", help="(default: deepspeed)")
    parser.add_argument("--micro-batch", type=int, default=16, help="samples per step (default: 16)")
    parser.add_argument("--steps", type=int, default=60, help="of every run (default: 60)")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints (default: 20)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each kind, in turn (default: 3)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of the steps (default: all cores)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override a key of the config")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    config = case_config(arguments.config, Case("base", arguments.micro_batch), tuple(arguments.overrides))
    config = config.model_copy(update={"train": config.train.model_copy(update={"engine": arguments.engine})})
    runs: dict[str, list[Measured]] = {name: [] for name in MODES}
    discover()
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for _ in range(arguments.repeat):
            for name, asynchronous in MODES.items():
                place = Path(folder, name)
                runs[name].append(measure(config, arguments.steps, arguments.every, place, asynchronous))
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
