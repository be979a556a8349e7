"""The training loop.

Tensor suffixes: Q predicted frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacog.config.schema import Config
from megacog.data.batch import Batch
from megacog.metrics.record import Recorder
from megacog.metrics.throughput import StepSpeed, Throughput
from megacog.model.layout import stage_layout
from megacog.model.transformer import LossOutput
from megacog.runtime.faults import fault_point
from megacog.runtime.hardware import memory_gib
from megacog.runtime.heartbeat import alive, beat
from megacog.runtime.log import get_logger
from megacog.runtime.signals import StopFlag
from megacog.training.checkpoints import Checkpoints
from megacog.training.engine import Engine
from megacog.training.guard import Guard
from megacog.training.schedule import learning_rate

log = get_logger(__name__)
_FLAGS = 2
"""Numbers that ride on the reduction of the losses."""


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, averaged over ranks and micro batches."""

    step: int
    loss: float
    frame_loss: dict[str, float]
    """Mean cross entropy by predicted frame: {"f1": 3.2, ...}."""
    grad_norm: float
    learning_rate: float
    applied: bool
    stop: bool
    """Some rank was asked to stop."""
    written: bool
    """No rank writes its share of a checkpoint any more."""
    sample_ids: list[str]
    """Of this rank."""


@dataclass
class Loop:
    """Everything that a step needs; `run` is the loop itself.

    Args:
        config: The run.
        engine: Model and optimizer.
        accumulation: Micro batches per step.
        device: Where batches go.
        evaluation: Batches of every evaluation; empty = none.
        recorder: metrics.jsonl and TensorBoard.
        throughput: Stopwatch.
        stop: Set by signals.
        checkpoints: Begins, and completes when all ranks have written, the checkpoints.
        sample: Writes the sample clips of a step; collective.
    """

    config: Config
    engine: Engine
    accumulation: int
    device: torch.device
    evaluation: Sequence[Batch]
    recorder: Recorder
    throughput: Throughput
    stop: StopFlag
    checkpoints: Checkpoints
    sample: Callable[[int], None]
    guard: Guard = field(default_factory=Guard)

    def run(self, batches: Iterator[Batch], start_step: int) -> int:
        """Train from after `start_step` to `train.steps` or a stop request; the last finished step."""
        train, step = self.config.train, start_step
        self.engine.model.train()
        self.throughput.restart()
        while step < train.steps:
            step += 1
            report = self.train_step(batches, step)
            speed = self.throughput.step(train.global_batch_size)
            if report.written:
                self.checkpoints.complete()
            self.guard.check(step, report.loss, report.grad_norm, report.applied, report.sample_ids)
            last = step == train.steps or report.stop
            if due(step, train.log_every) or last:
                self.record(report, speed)
            evaluation_loss = None
            if self.evaluation and (due(step, train.eval_every) or (last and train.eval_every and not report.stop)):
                evaluation_loss = self.evaluate(step)
            if due(step, self.config.samples.every):
                beat("samples", step)
                self.sample(step)
            if last:
                beat("save", step)
                self.checkpoints.save_last(step, evaluation_loss)
            elif due(step, self.config.checkpoint.every):
                beat("save", step)
                self.checkpoints.save(step, evaluation_loss)
            self.throughput.restart()
            if report.stop:
                break
        return step

    def train_step(self, batches: Iterator[Batch], step: int) -> StepReport:
        """Forward and backward over all micro batches, then one optimizer step."""
        sums, sample_ids = self._zeros(), []
        for _ in range(self.accumulation):
            with self.throughput.waiting():
                begin("data", step)
                batch = next(batches).to(self.device)
            output = self.forward(batch, step)
            self.engine.backward(output.loss)
            sums[_FLAGS:] += self._numbers(output) / self.accumulation
            sample_ids += batch.sample_ids
        spoil = begin("step", step)
        rate = learning_rate(step, self.config.train)
        applied = self.engine.step(rate)
        if spoil == "flip":
            flip_bit(self.engine.model)
        sums[0], sums[1] = float(self.stop.requested), float(self.checkpoints.writing)
        stop, writing, loss, *frame_loss = self._mean_over_ranks(sums)
        return StepReport(
            step, loss, self._by_frame(frame_loss), self.engine.grad_norm, rate, applied, stop > 0, writing == 0,
            sample_ids,
        )  # fmt: skip

    def forward(self, batch: Batch, step: int) -> LossOutput:
        """The losses of a micro batch of a step."""
        spoil = begin("forward", step)
        output = self.engine.forward(**self.inputs(batch))
        if spoil == "nan":
            output = LossOutput(output.loss * float("nan"), output.frame_loss_Q)
        if begin("backward", step) == "nan":
            output.loss.register_hook(lambda gradient: gradient * float("nan"))
        return output

    @torch.no_grad()
    def evaluate(self, step: int) -> float:
        """Mean loss over the evaluation batches of all ranks, logged and recorded."""
        begin("evaluate", step)
        self.engine.model.eval()
        sums = self._zeros()
        samples = sum(len(batch) for batch in self.evaluation)
        for batch in self.evaluation:
            output = self.engine.forward(**self.inputs(batch.to(self.device)))
            sums[_FLAGS:] += self._numbers(output) * (len(batch) / samples)
            alive()
        self.engine.model.train()
        loss, *frame_loss = self._mean_over_ranks(sums)[_FLAGS:]
        by_frame = self._by_frame(frame_loss)
        log.info("step %d | evaluation loss %.4f | %s", step, loss, _format_frames(by_frame))
        self.recorder.write(step, "eval", loss=loss, frame_loss=by_frame)
        return loss

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model's forward arguments for a batch."""
        return {
            "text_BL": batch.text_BL,
            "text_valid_BL": batch.text_valid_BL,
            "frames_BTP": batch.frames_BTP,
            "context_BTP": batch.context_BTP,
            "stage": self.config.train.stage,
            "frame_weights": self.config.loss.frame_weights,
        }

    def record(self, report: StepReport, speed: StepSpeed) -> None:
        """One readable line, and the same numbers in the record."""
        train = self.config.train
        memory = memory_gib()
        log.info(
            "step %d/%d | loss %.4f | %s | grad norm %.3f | lr %.2e | %.0f tokens/s | %.3g TFLOP/s | MFU %s HFU %s | "
            "%.2f GiB | data wait %.0f%% | eta %s%s",
            report.step, train.steps, report.loss, _format_frames(report.frame_loss), report.grad_norm,
            report.learning_rate, speed.tokens_per_second, speed.tflops, _format_share(speed.mfu),
            _format_share(speed.hfu), memory, 100 * speed.data_wait,
            _format_seconds(speed.seconds * (train.steps - report.step)), "" if report.applied else " | SKIPPED",
        )  # fmt: skip
        self.recorder.write(
            report.step, "train",
            loss=report.loss, frame_loss=report.frame_loss, grad_norm=report.grad_norm,
            learning_rate=report.learning_rate, applied=report.applied,
            samples=report.step * train.global_batch_size, seconds=speed.seconds,
            tokens_per_second=speed.tokens_per_second, tflops=speed.tflops,
            hardware_tflops=speed.hardware_tflops, mfu=speed.mfu, hfu=speed.hfu, memory_gib=memory,
            data_wait=speed.data_wait,
        )  # fmt: skip

    def _zeros(self) -> Tensor:
        """Flags (some rank stops, some rank writes), loss, then the loss of each predicted frame."""
        frames = stage_layout(self.config.model, self.config.train.stage).loss_frames
        return torch.zeros(_FLAGS + 1 + len(frames), device=self.device)

    def _numbers(self, output: LossOutput) -> Tensor:
        return torch.cat([output.loss.detach().view(1), output.frame_loss_Q]).float()

    def _mean_over_ranks(self, sums: Tensor) -> list[float]:
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)  # tensor-parallel ranks count twice with equal numbers
            sums /= dist.get_world_size()
        return [float(number) for number in sums.tolist()]

    def _by_frame(self, losses: Sequence[float]) -> dict[str, float]:
        frames = stage_layout(self.config.model, self.config.train.stage).loss_frames
        return {f"f{frame}": loss for frame, loss in zip(frames, losses, strict=True)}


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0 = never) happens at this step."""
    return every > 0 and step % every == 0


def begin(phase: str, step: int) -> Literal["nan", "flip"] | None:
    """Tell the watch that a phase begins; what an injected fault spoils in it."""
    beat(phase, step)
    return fault_point(phase, step)


@torch.no_grad()
def flip_bit(model: nn.Module) -> None:
    """Change one bit of one weight, as a cosmic ray or a bad memory cell would."""
    weight = next(parameter for parameter in model.parameters() if parameter.numel())
    weight.view(-1)[:1].view(torch.uint8)[0] ^= 1


def _format_frames(losses: dict[str, float]) -> str:
    return " ".join(f"{frame} {loss:.3f}" for frame, loss in losses.items())


def _format_share(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f}%"


def _format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
