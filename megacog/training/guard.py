"""What happens when a loss or gradient norm is not finite: skip the step, and stop if it goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megacog.errors import MegacogError
from megacog.runtime.log import get_logger

log = get_logger(__name__)

MAX_CONSECUTIVE_SKIPS = 5


class NonFiniteError(MegacogError):
    """Loss or gradients were not finite for several steps in a row."""


class Guard:
    """Counts skipped steps; the same numbers reach every rank, so all ranks stop together.

    Args:
        limit: Consecutive skipped steps that end the run.
    """

    def __init__(self, limit: int = MAX_CONSECUTIVE_SKIPS) -> None:
        self.limit = limit
        self.consecutive = 0
        self.skipped = 0

    def check(self, step: int, loss: float, grad_norm: float, applied: bool, sample_ids: Sequence[str]) -> None:
        """Accept a finished step.

        Args:
            step: Optimizer step, from 1.
            loss: Mean over all ranks.
            grad_norm: Before clipping; not finite when the engine skipped the step.
            applied: Whether the engine changed the weights.
            sample_ids: Samples of this rank in the step, for the message.

        Raises:
            NonFiniteError: `limit` steps in a row were skipped, or a non-finite one was applied.
        """
        if applied and math.isfinite(loss) and math.isfinite(grad_norm):
            self.consecutive = 0
            return
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}; this rank's samples: {', '.join(sample_ids)}"
        if applied:
            raise NonFiniteError(f"{what}. The step was applied, the weights are spoiled: resume a checkpoint.")
        self.consecutive += 1
        self.skipped += 1
        log.warning("%s. Step skipped (%d in a row).", what, self.consecutive)
        if self.consecutive >= self.limit:
            raise NonFiniteError(
                f"{what}. {self.consecutive} steps in a row were not finite; stopped. Lower train.learning_rate or "
                "train.gradient_clip, try train.precision fp32, or look at these samples; then resume."
            )
