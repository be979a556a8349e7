"""Proof that a model learns, and that a killed run goes on bit for bit: a few clips are learned by heart.

    python launch/prove.py memorize RUN_DIR [--steps 300] [--save-at 100] [--seconds 480] [--config FILE] [key=value]

The base is random and frozen, the clips are random codes: only attention-plus can tell them apart, so the loss starts
at the logarithm of the number of codes. A first process saves a checkpoint and dies of SIGKILL some steps later; a
second one resumes. The steps that both made must agree in every bit of loss and gradient norm, and the last loss must
be small. The learning rate is a setting: train.learning_rate=1e-3.

Room for the 9B model: 11.8 GB of frozen weights and one checkpoint of 25.5 GB, in RUN_DIR, which is removed at the end.
A folder in /dev/shm is the fastest. --json is written again and again while both processes run, with every loss so far.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megacog.checkpoint.discovery import find_checkpoint
from megacog.checkpoint.rng import seed_everything
from megacog.config.schema import Config
from megacog.data.batch import Batch
from megacog.errors import EXIT_DONE, EXIT_FAULT, EnvError
from megacog.metrics.record import FILE_NAME, Recorder, read_records
from megacog.runtime import log as logs
from megacog.runtime.cli import run
from megacog.runtime.files import write_json
from megacog.runtime.hardware import describe_device
from megacog.runtime.signals import StopFlag
from megacog.training.benchmark import CPU_CONFIG, GPU_CONFIG
from megacog.training.checkpoints import Checkpoints
from megacog.training.engine import build_engine
from megacog.training.loop import Loop
from megacog.training.measure import Case, case_config
from megacog.training.pretrain import build_model, build_throughput, example_inputs, versions
from megacog.training.state import RunState, shapes_of
from megacog.training.synthetic import SINGLE, batches, random_base

MEMORIZED = 2.0
"""Loss in nats per code below which clips count as known; 20,000 equally likely codes have 9.9."""
_STEPS_AFTER_SAVE = 5
_JSON_SECONDS = 5.0
"""Between two versions of --json."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What both processes did."""

    first_loss: float
    last_loss: float
    steps: int
    repeated: int
    """Steps that both processes made."""
    differing: int
    """Of these, how many differ in loss or gradient norm."""
    step_seconds: float
    """Median of the second process."""

    @property
    def accepted(self) -> bool:
        return self.last_loss < MEMORIZED and self.repeated > 0 and self.differing == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run both processes, or be one of them; 1 when the clips are not known in the end or a bit differs."""
    arguments = parse_arguments(argv)
    if arguments.child:
        train(arguments)
        return EXIT_DONE
    if arguments.run_dir.exists():
        raise EnvError(f"{arguments.run_dir} exists; name a new folder, which is removed in the end")
    metrics, started = arguments.run_dir / FILE_NAME, time.monotonic()
    before: dict[int, Record] = {}

    def progress() -> None:
        losses = {step: record["loss"] for step, record in (before | train_records(metrics)).items()}
        write(arguments.json, {"finished": False, "killed_after": max(before, default=None), "losses": losses})

    try:
        killed = follow([*child_command(arguments), "--die"], progress)
        if killed != -signal.SIGKILL:
            raise EnvError(f"the first process was to be killed, but ended with code {killed}; see its log above")
        before = train_records(metrics)
        print(f"killed after step {max(before)}, {time.monotonic() - started:.0f} s", flush=True)
        end = [] if arguments.seconds is None else ["--until", str(started + arguments.seconds)]
        code = follow([*child_command(arguments), *end], progress)
        if code != EXIT_DONE:
            raise EnvError(f"the second process ended with code {code}; see its log above")
        after = train_records(metrics)
    finally:
        shutil.rmtree(arguments.run_dir, ignore_errors=True)
    outcome = compare(before, after, arguments.save_at)
    say(outcome, time.monotonic() - started)
    losses = {step: record["loss"] for step, record in after.items()}
    found = {"device": describe_device(), **vars(outcome), "accepted": outcome.accepted}
    write(arguments.json, {**found, "finished": True, "losses": losses})
    return EXIT_DONE if outcome.accepted else EXIT_FAULT


def follow(command: Sequence[str], progress: Callable[[], None]) -> int:
    """Run a process, its exit code; `progress` is called every few seconds and when it has ended."""
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait(_JSON_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            finally:
                progress()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prove.py memorize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="a new folder for the run")
    parser.add_argument("--config", type=Path, help="run to take the model from")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=8, help="clips per step; must divide --clips")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-at", type=int, default=100, help="step of the checkpoint")
    parser.add_argument("--seconds", type=float, help="end then, with the steps made so far (default: no limit)")
    parser.add_argument("--json", type=Path, help="also write the outcome and every loss here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--die", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override a key of the config")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.clips % arguments.micro_batch:
        parser.error(f"--micro-batch {arguments.micro_batch} does not divide --clips {arguments.clips}")
    if not 0 < arguments.save_at <= arguments.steps - _STEPS_AFTER_SAVE:
        parser.error(f"--save-at {arguments.save_at} is not at least {_STEPS_AFTER_SAVE} steps before --steps")
    return arguments


def child_command(arguments: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "megacog.training.memorize", str(arguments.run_dir), "--child"]
    command += [] if arguments.config is None else ["--config", str(arguments.config)]
    for name in ("clips", "micro_batch", "steps", "save_at"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return [*command, *arguments.overrides]


def train_records(metrics: Path) -> dict[int, Record]:
    """The training records so far by step."""
    if not metrics.exists():
        return {}
    return {record["step"]: record for record in read_records(metrics) if record["kind"] == "train"}


def compare(before: dict[int, Record], after: dict[int, Record], saved: int) -> Outcome:
    """The killed process's records against those that the second one left."""
    repeated = [step for step in before if step > saved and step in after]
    keys = ("loss", "frame_loss", "grad_norm")
    differing = sum(any(before[step][key] != after[step][key] for key in keys) for step in repeated)
    seconds = sorted(record["seconds"] for step, record in after.items() if step > saved)
    first, last = min(after), max(after)
    return Outcome(
        after[first]["loss"], after[last]["loss"], last, len(repeated), differing, seconds[len(seconds) // 2]
    )


def say(outcome: Outcome, seconds: float) -> None:
    """The outcome on stdout."""
    print(
        f"{describe_device()}\n"
        f"loss {outcome.first_loss:.3f} at step 1, {outcome.last_loss:.3f} at step {outcome.steps}; "
        f"goal < {MEMORIZED:g}\n{outcome.repeated} steps repeated after the kill, {outcome.differing} of them differ\n"
        f"{outcome.step_seconds:.3f} s per step, {seconds:.0f} s in all: {'accepted' if outcome.accepted else 'MISSED'}"
    )


def write(path: Path | None, found: dict[str, Any]) -> None:
    """JSON, if a file was asked for."""
    if path is not None:
        write_json(path, found)


def memorizing_config(arguments: argparse.Namespace) -> Config:
    """No dropout and no decay: what is to be learned by heart is not to be disturbed."""
    default = GPU_CONFIG if torch.cuda.is_available() else CPU_CONFIG
    settings = (
        "model.embedding_dropout=0", "model.mlp_dropout=0", "train.weight_decay=0", "train.gradient_clip=1.0",
        "train.learning_rate=3e-4", "train.warmup_steps=20", "train.log_every=1", "checkpoint.keep_last=1",
        *arguments.overrides, f"train.steps={arguments.steps}",
    )  # fmt: skip
    config = case_config(arguments.config or default, Case("sequential", arguments.micro_batch), settings)
    return config.model_copy(update={"train": config.train.model_copy(update={"run_dir": str(arguments.run_dir)})})


class _OneCheckpoint(Checkpoints):
    """One checkpoint, as two would not fit on every disk; some steps later the process may die."""

    at: int
    die: bool

    def save(self, step: int, evaluation_loss: float | None) -> None:
        if step == self.at:
            super().save(step, evaluation_loss)
            self.complete()
        if self.die and step == self.at + _STEPS_AFTER_SAVE:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_last(self, step: int, evaluation_loss: float | None) -> None:
        """Nothing: the run is over."""


def train(arguments: argparse.Namespace) -> None:
    """Train, or go on from the checkpoint; one is written, at the step asked for."""
    logs.setup()
    config = memorizing_config(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed_everything(config.train.seed)
    checkpoint = find_checkpoint(arguments.run_dir, "auto")
    base = random_base(config, device)
    model, resumed, _ = build_model(config, SINGLE, device, None if checkpoint else base, checkpoint)
    shapes = shapes_of(model)
    engine = build_engine(config, model, SINGLE, accumulation=1)
    state = RunState(config, engine, SINGLE, shapes, {}, versions(), (base, []))
    start = state.restore(resumed, example_inputs(config, device)) if resumed else 0
    recorder = Recorder(arguments.run_dir, 0, tensorboard=False)
    recorder.truncate_after(start)
    throughput = build_throughput(config, world_size=1)

    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 1})})
    checkpoints = _OneCheckpoint(state, config.checkpoint, recorder)
    checkpoints.at, checkpoints.die = arguments.save_at, arguments.die
    stop = StopFlag()
    loop = Loop(config, engine, 1, device, [], recorder, throughput, stop, checkpoints, sample=lambda step: None)
    distinct = arguments.clips // arguments.micro_batch
    endless = batches(config.model, "sequential", arguments.micro_batch, distinct, start)
    loop.run(until(arguments.until, endless, stop), start)
    recorder.close()


def until(end: float | None, endless: Iterator[Batch], stop: StopFlag) -> Iterator[Batch]:
    """The batches; one that is taken after `end` (as `time.monotonic` counts) is the last."""
    for batch in endless:
        if end is not None and time.monotonic() >= end:
            stop.requested = True
        yield batch


if __name__ == "__main__":
    run(main)
