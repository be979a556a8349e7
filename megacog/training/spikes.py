"""Loss spikes: a loss far above those of the steps before, by their mean and standard deviation."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence


class Spikes:
    """Running z-score of the loss (128 steps and 6 deviations are OLMo's numbers).

    Args:
        window: Steps of which mean and deviation are taken; before so many have passed nothing is a spike.
        sigma: Deviations above the mean that make a spike; 0 = none is.
    """

    def __init__(self, window: int, sigma: float) -> None:
        self.sigma = sigma
        self.losses: deque[float] = deque(maxlen=window)
        """Of the last steps; the state that a checkpoint keeps."""

    def score(self, loss: float) -> float | None:
        """Deviations above the mean if this step's loss is a spike; the loss counts for the steps after it."""
        score = self._score(loss)
        if math.isfinite(loss):
            self.losses.append(loss)
        return score

    def _score(self, loss: float) -> float | None:
        if not self.sigma or len(self.losses) < (self.losses.maxlen or 0) or not math.isfinite(loss):
            return None
        mean = sum(self.losses) / len(self.losses)
        deviation = math.sqrt(sum((one - mean) ** 2 for one in self.losses) / len(self.losses))
        if loss - mean <= self.sigma * deviation or deviation == 0.0:
            return None
        return (loss - mean) / deviation

    def restore(self, losses: Sequence[float]) -> None:
        """Go on after the losses that a checkpoint has kept."""
        self.losses.clear()
        self.losses.extend(losses)
