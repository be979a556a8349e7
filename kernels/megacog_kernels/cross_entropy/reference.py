"""What is done to the rows of a chunk of logits, in plain torch: the definition, and the CPU path.

Legend: X rows of the chunk, V columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def summarize_rows(logits_XV: Tensor, targets_X: Tensor, lse_X: Tensor, target_X: Tensor) -> None:
    """Fill each row's logsumexp (-inf without columns) and its target's logit (0 without such a column).

    Args:
        logits_XV: In the run's dtype.
        targets_X: int64; a row whose target is outside [0, V) has none here.
        lse_X, target_X: fp32, overwritten.
    """
    torch.logsumexp(logits_XV.float(), dim=1, out=lse_X)
    column_X, inside_X = _columns(targets_X, logits_XV.shape[1])
    target_X.zero_()
    if logits_XV.shape[1]:
        target_X.copy_(torch.where(inside_X, logits_XV.gather(1, column_X[:, None])[:, 0].float(), 0.0))


def differentiate_rows(
    logits_XV: Tensor, targets_X: Tensor, lse_X: Tensor, grad_lse_X: Tensor, grad_target_X: Tensor
) -> None:
    """Overwrite logits by their gradient: grad_lse * exp(logit - lse), plus grad_target at the target."""
    grad_XV = torch.exp(logits_XV.float() - lse_X[:, None]).mul_(grad_lse_X[:, None])
    column_X, inside_X = _columns(targets_X, logits_XV.shape[1])
    if logits_XV.shape[1]:
        grad_XV.scatter_add_(1, column_X[:, None], torch.where(inside_X, grad_target_X, 0.0)[:, None])
    logits_XV.copy_(grad_XV)


def _columns(targets_X: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """A column for every row, and whether it is the row's target."""
    inside_X = (targets_X >= 0) & (targets_X < V)
    return targets_X.masked_fill(~inside_X, 0), inside_X
