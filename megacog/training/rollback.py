"""Rollbacks of a run: which samples were left out after them, so that every later start leaves out the same.

After a spike at step n the run leaves, and its next start goes on from checkpoint c with the samples that would have
followed those of step n: step s > c takes the samples of step s + (n - c). `rollbacks.json` in the run's folder says
so; the samples of a step are a function of this file and the step alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megacog.errors import CheckpointError
from megacog.runtime.files import atomic_file

FILE_NAME = "rollbacks.json"


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
        with atomic_file(run_dir / FILE_NAME, "w") as file:
            json.dump([asdict(entry) for entry in self.entries], file, indent=1)


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
        raise CheckpointError(f"{path} cannot be read ({error}); it says which samples are left out after a spike") from None
