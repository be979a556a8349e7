"""One way of training, measured on this device: step time, memory, and where the time goes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megacog.config.load import load_config
from megacog.config.schema import Checkpointing, Config, Stage
from megacog.metrics.profile import StepProfile, optimizer_range, profile_step
from megacog.model.flops import Work, tokens_per_sample, training_work
from megacog.runtime.peak_memory import peak_bytes, start_peak
from megacog.runtime.speed import synchronize
from megacog.training.engine import Engine
from megacog.training.synthetic import random_engine, random_inputs

WARM_UPS = 3
FEWEST_STEPS = 3


@dataclass(frozen=True)
class Case:
    """One way of training a model."""

    stage: Stage
    micro_batch: int
    policy: Checkpointing = "none"
    fp8: bool = False
    """The frozen base in e4m3."""

    @property
    def name(self) -> str:
        parts = [self.stage, f"micro batch {self.micro_batch}"]
        parts += [] if self.policy == "none" else [self.policy]
        return ", ".join(parts + (["fp8 base"] if self.fp8 else []))


@dataclass(frozen=True)
class Measured:
    """What one case reached."""

    case: Case
    work: Work
    """Of one sample."""
    seconds: float
    """Median of whole optimizer steps of one micro batch."""
    steps: int
    """Timed ones."""
    loss: float
    """Of the last step."""
    peak_bytes: int
    tokens_per_second: float
    profile: StepProfile

    @property
    def model_tflops(self) -> float:
        return self.work.model * self.case.micro_batch / self.seconds / 1e12

    @property
    def hardware_tflops(self) -> float:
        return self.work.hardware * self.case.micro_batch / self.seconds / 1e12

    @property
    def attention_tflops(self) -> float:
        """While kernels of attention run; what they compute twice does not count."""
        return self.work.attention * self.case.micro_batch / max(self.profile.seconds["attention"], 1e-9) / 1e12

    @property
    def idle(self) -> float:
        """Share of the step without a kernel on the device; below 0 is what the profiler adds to kernels."""
        return 1 - (sum(self.profile.seconds.values()) + self.profile.unknown) / self.seconds


def case_config(path: Path, case: Case, overrides: tuple[str, ...] = ()) -> Config:
    """A run of the case on one device, with the plain engine and no data.

    Args:
        path: Any run's configuration.
        case: What is asked of it.
        overrides: Further `key=value`, which come before the case's own.
    """
    own = [
        f"train.stage={case.stage}", f"train.micro_batch_size={case.micro_batch}",
        f"train.global_batch_size={case.micro_batch}", f"train.activation_checkpointing={case.policy}",
        "train.engine=torch", "train.run_dir=none", "parallel.tensor=1", "deepspeed={}", "loss.frame_weights=null",
        f"model.inherit={'null' if case.stage == 'base' else 'none'}", "model.plus_from=base",
    ]  # fmt: skip
    own += ["train.base_precision=fp8", "train.precision=bf16"] if case.fp8 else []
    config = load_config(path, [*overrides, *own])
    boi = config.model.boi_id or 0
    return config.model_copy(update={"model": config.model.model_copy(update={"boi_id": boi})})


def measure(config: Config, case: Case, device: torch.device, seconds: float) -> Measured:
    """Train on one batch again and again, and time it after a warm-up.

    Args:
        config: As `case_config` made it.
        case: The same case.
        device: Where.
        seconds: To time for, at least three steps.
    """
    try:
        return _measure(config, case, device, seconds)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(config: Config, case: Case, device: torch.device, seconds: float) -> Measured:
    start_peak(device)
    step = _stepper(random_engine(config, device), config, device)
    for _ in range(WARM_UPS):
        step()
    times: list[float] = []
    while len(times) < FEWEST_STEPS or sum(times) < seconds:
        synchronize(device)
        start = time.perf_counter()
        loss = step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    peak, typical = peak_bytes(device), statistics.median(times)
    tokens = case.micro_batch * tokens_per_sample(config.model, case.stage)
    work = training_work(config.model, case.stage, case.policy)
    profile = profile_step(step, device)
    return Measured(case, work, typical, len(times), float(loss), peak, tokens / typical, profile)


def _stepper(engine: Engine, config: Config, device: torch.device) -> Callable[[], torch.Tensor]:
    inputs = random_inputs(config, device)

    def step() -> torch.Tensor:
        loss = engine.forward(**inputs).loss
        engine.backward(loss)
        with optimizer_range():
            engine.step(config.train.learning_rate)
        return loss.detach()

    return step
