"""The training loop.

Tensor suffixes: Q predicted frames.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacog.checkpoint.commit import rank_and_size
from megacog.config.schema import Config
from megacog.data.batch import Batch
from megacog.metrics.record import Recorder
from megacog.metrics.throughput import StepSpeed, Throughput
from megacog.model.layout import stage_layout
from megacog.model.transformer import LossOutput
from megacog.runtime.faults import fault_point
from megacog.runtime.hardware import memory_gib
from megacog.runtime.heartbeat import alive, beat
from megacog.runtime.log import SHARED, get_logger
from megacog.runtime.signals import StopFlag
from megacog.training.checkpoints import Checkpoints
from megacog.training.engine import Engine
from megacog.training.guard import Guard, MicroBatch, require_finite_weights
from megacog.training.replicas import compare_replicas
from megacog.training.schedule import learning_rate
from megacog.training.switches import Switches

log = get_logger(__name__)
_FLAGS = 3
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
    """No rank writes files of a checkpoint now."""
    save: bool
    """Somebody wants a checkpoint of this step."""
    micro_batches: list[MicroBatch]
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
        tensor_rank: This rank's, for the comparison of weights.
        switches: Files and limits that stop the run or want a checkpoint; None = there are none.
        roll_back: Given the step and loss of a spike, makes the next start leave these samples out, if it can;
            collective. None = spikes are only told.
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
    tensor_rank: int = 0
    switches: Switches | None = None
    roll_back: Callable[[int, float], bool] | None = None
    guard: Guard = field(init=False)
    _warned: bool = field(default=False, init=False)
    rolled_back: bool = field(default=False, init=False)
    """The run has left after a spike; its next start goes on from an older step."""

    def __post_init__(self) -> None:
        self.guard = Guard(self.config.watch, Path(self.config.train.run_dir), rank_and_size()[0])

    def run(self, batches: Iterator[Batch], start_step: int) -> int:
        """Train from after `start_step` to `train.steps`, a stop request or a rollback; the last finished step."""
        train, step = self.config.train, start_step
        if self._stop_agreed():  # while the model was built
            return step
        self.engine.model.train()
        self.throughput.restart()
        while step < train.steps:
            step += 1
            report = self.train_step(batches, step)
            speed = self.throughput.step(train.global_batch_size)
            if report.written:
                self.checkpoints.advance()
                self.warn_of_short_lead(speed.seconds)
            spike = self.guard.check(step, report.loss, report.grad_norm, report.applied, report.micro_batches)
            stop, evaluation_loss = report.stop, None
            if due(step, train.log_every) or step == train.steps or stop:
                self.record(report, speed)
            if spike is not None and self.roll_back is not None and self.roll_back(step, report.loss):
                self.rolled_back = True
                break
            at_end = step == train.steps and train.eval_every > 0
            if self.evaluation and not stop and (due(step, train.eval_every) or at_end):
                evaluation_loss = self.evaluate(step)
                stop = self._stop_agreed()
            if due(step, self.config.samples.every) and not stop:
                beat("samples", step)
                self.sample(step)
                stop = self._stop_agreed()
            self.save(step, report.save, stop or step == train.steps, evaluation_loss)
            self.throughput.restart()
            if stop:
                break
        return step

    def save(self, step: int, wanted: bool, last: bool, evaluation_loss: float | None) -> None:
        """Save if it is due or wanted, and before that look at the weights: no checkpoint of corrupt ones is made."""
        due_now = last or wanted or due(step, self.config.checkpoint.every)
        if self.config.watch.compare_weights_every and (due_now or due(step, self.config.watch.compare_weights_every)):
            compare_replicas(self.engine.model, self.tensor_rank, step)
        if not due_now:
            return
        require_finite_weights(self.engine.model, step)
        beat("save", step)
        if last:
            self.checkpoints.save_last(step, evaluation_loss)
        else:
            self.checkpoints.save(step, evaluation_loss)
        if wanted and self.switches is not None:
            self.switches.saved()

    def warn_of_short_lead(self, step_seconds: float) -> None:
        """Say once if a scheduler's warning comes too late for a step and a save, with as much to spare."""
        lead, saving = self.config.cluster.save_seconds, self.checkpoints.seconds
        if self._warned or saving is None or "SLURM_JOB_ID" not in os.environ:
            return
        self._warned = True
        if lead < 2 * (step_seconds + saving):
            log.warning(
                "a step takes %.0f s and a save %.0f s: cluster.save_seconds %d, from SLURM's signal to the end of the "
                "job, should be at least twice their sum", step_seconds, saving, lead, extra=SHARED,
            )  # fmt: skip

    def train_step(self, batches: Iterator[Batch], step: int) -> StepReport:
        """Forward and backward over all micro batches, then one optimizer step."""
        sums, done = self._zeros(), []
        for _ in range(self.accumulation):
            with self.throughput.waiting():
                begin("data", step)
                batch = next(batches).to(self.device)
            output = self.forward(batch, step)
            self.engine.backward(output.loss)
            done.append(MicroBatch(batch.sample_ids, self._numbers(output)))
            sums[_FLAGS:] += done[-1].losses / self.accumulation
        spoil = begin("step", step)
        rate = learning_rate(step, self.config.train)
        applied = self.engine.step(rate)
        if spoil is not None:
            spoil_weight(self.engine.model, spoil)
        save = self.switches is not None and self.switches.save_requested()  # may ask for a stop, too
        sums[:_FLAGS] = torch.tensor([self.stop.requested, self.checkpoints.writing, save])
        stop, writing, wanted, loss, *frame_loss = self._mean_over_ranks(sums)
        return StepReport(
            step, loss, self._by_frame(frame_loss), self.engine.grad_norm, rate, applied, stop > 0, writing == 0,
            wanted > 0, done,
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
            learning_rate=report.learning_rate, applied=report.applied, skipped=self.guard.skipped,
            samples=report.step * train.global_batch_size, seconds=speed.seconds,
            tokens_per_second=speed.tokens_per_second, tflops=speed.tflops,
            hardware_tflops=speed.hardware_tflops, mfu=speed.mfu, hfu=speed.hfu, memory_gib=memory,
            data_wait=speed.data_wait,
        )  # fmt: skip

    def _stop_agreed(self) -> bool:
        """Whether some rank was asked to stop, between steps. Collective."""
        flag = torch.tensor([float(self.stop.requested)], device=self.device)
        return self._mean_over_ranks(flag)[0] > 0

    def _zeros(self) -> Tensor:
        """Flags (some rank stops, some rank writes, rank 0 wants to save), loss, then that of each predicted frame."""
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
def spoil_weight(model: nn.Module, kind: Literal["nan", "flip"]) -> None:
    """Make one weight NaN, or change one bit of it, as a cosmic ray or a bad memory cell would."""
    weight = next(parameter for parameter in model.parameters() if parameter.numel())
    if kind == "nan":
        weight.view(-1)[0] = float("nan")
    else:
        weight.view(-1)[:1].view(torch.uint8)[0] ^= 1


def _format_frames(losses: dict[str, float]) -> str:
    return " ".join(f"{frame} {loss:.3f}" for frame, loss in losses.items())


def _format_share(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f}%"


def _format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
