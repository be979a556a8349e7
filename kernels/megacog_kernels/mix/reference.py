"""The mix in plain torch: its definition, and the CPU path."""

from __future__ import annotations

from torch import Tensor


def mix(base: Tensor, plus: Tensor, logit: Tensor) -> Tensor:
    """a * base + (1 - a) * plus [..., C], a = sigmoid(logit [C])."""
    share_C = logit.sigmoid()
    return share_C * base + (1 - share_C) * plus
