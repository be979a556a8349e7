"""The learning rate of every optimizer step."""

from __future__ import annotations

import math

from megacog.config.schema import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 1.

    Linear warm-up to `learning_rate` over `warmup_steps`, then a cosine that reaches
    `min_learning_rate_ratio` of it at the last step. A pure function: resuming needs no state.
    """
    if step < 1:
        raise ValueError(f"steps are counted from 1, not {step}")
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    progress = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    low = train.min_learning_rate_ratio
    return train.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)
