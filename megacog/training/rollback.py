"""Rollbacks of a run: which samples were left out after them, so that every later start leaves out the same.

After a spike at step n the run leaves, and its next start goes on from checkpoint c with the samples that would have
followed those of step n: step s > c takes the samples of step s + (n - c). `rollbacks.json` in the run's folder says
so; the samples of a step are a function of this file and the step alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megacog.checkpoint.discovery import list_checkpoints
from megacog.data.batch import Batch
from megacog.data.loader import TrainingBatches
from megacog.errors import CheckpointError, MegacogError
from megacog.runtime.files import write_json
from megacog.runtime.log import get_logger

log = get_logger(__name__)

FILE_NAME = "rollbacks.json"


class SpikeError(MegacogError):
    """The loss spikes again and again."""


@dataclass(frozen=True)
class Rollback:
    """One of them.

    Attributes:
        spike: Step whose loss was a spike.
        loss: That loss.
        checkpoint: Step from which the run goes on.
        shift: Steps after `checkpoint` take the samples of so many steps later.
    """

    spike: int
    loss: float
    checkpoint: int
    shift: int


class Rollbacks:
    """The rollbacks of a run, in the order in which they came.

    Args:
        entries: Of the run's file.
    """

    def __init__(self, entries: tuple[Rollback, ...] = ()) -> None:
        self.entries = entries

    def shift(self, step: int) -> int:
        """How many steps later than its own the samples of a step were drawn."""
        return next((entry.shift for entry in reversed(self.entries) if step > entry.checkpoint), 0)

    def after(self, spike: int, loss: float, checkpoint: int) -> Rollbacks:
        """With one more, at the present end of the run."""
        entry = Rollback(spike, loss, checkpoint, spike + self.shift(spike) - checkpoint)
        return Rollbacks((*self.entries, entry))

    def write(self, run_dir: Path) -> None:
        """Keep them."""
        write_json(run_dir / FILE_NAME, [asdict(entry) for entry in self.entries])


def read_rollbacks(run_dir: Path) -> Rollbacks:
    """Those of a run; none without the file.

    Raises:
        CheckpointError: The file is damaged: without it other samples would be trained.
    """
    path = run_dir / FILE_NAME
    try:
        return Rollbacks(tuple(Rollback(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return Rollbacks()
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}, which says what samples are left out after a spike: {error}") from None


def record_rollback(run_dir: Path, rollbacks: Rollbacks, most: int, step: int, loss: float) -> bool:
    """Note a rollback from a spike to the newest checkpoint; false if there is none to go back to.

    Raises:
        SpikeError: There have been `most` already.
    """
    found = list_checkpoints(run_dir)
    if not found:
        log.warning("step %d: no checkpoint to roll back to; the run goes on", step)
        return False
    if len(rollbacks.entries) >= most:
        raise SpikeError(
            f"step {step}: loss {loss:.4f} is a spike, and {most} rollbacks have not helped (watch.max_rollbacks). "
            "Lower train.learning_rate or train.gradient_clip, look at the samples in bad_steps, then resume"
        )
    checkpoint = int(found[0].name.rpartition("-")[2])
    rollbacks.after(step, loss, checkpoint).write(run_dir)
    log.warning(
        "step %d: rolled back to step %d; the samples of steps %d to %d are left out from now on (%s)",
        step, checkpoint, checkpoint + 1, step, run_dir / FILE_NAME,
    )  # fmt: skip
    return True


class ShiftedBatches(Iterator[Batch]):
    """The micro batches of a rank with the samples of spikes left out.

    Args:
        open_at: The batches from a step of the stream on, as `training_batches` counts: 0 = of step 1.
        rollbacks: Of the run.
        start_step: The last finished step.
    """

    def __init__(self, open_at: Callable[[int], TrainingBatches], rollbacks: Rollbacks, start_step: int) -> None:
        self._open_at, self._rollbacks = open_at, rollbacks
        self._step, self._micro = start_step + 1, 0
        self._shift = rollbacks.shift(self._step)
        self._batches = open_at(start_step + self._shift)

    def __next__(self) -> Batch:
        shift = self._rollbacks.shift(self._step)
        if shift != self._shift:
            self._batches.close()
            self._shift, self._batches = shift, self._open_at(self._step - 1 + shift)
        batch = next(self._batches)
        self._micro += 1
        if self._micro == self._batches.accumulation:
            self._step, self._micro = self._step + 1, 0
        return batch

    def close(self) -> None:
        """End the loader processes."""
        self._batches.close()
