"""Cross entropy over a vocabulary that is cut over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from megacog.parallel.tensor import TensorParallel, copy_to_ranks, gather_from_ranks
from megacog_kernels.cross_entropy import linear_logsumexp
from megacog_kernels.dispatch import Implementation


def parallel_cross_entropy(
    hidden_XC: Tensor,
    weight_VC: Tensor,
    targets_X: Tensor,
    first: int,
    parallel: TensorParallel,
    kernels: Implementation = "auto",
) -> Tensor:
    """Cross entropy of logits = hidden @ weight^T per row in fp32: [X]. The logits never exist as a whole.

    Args:
        hidden_XC: Hidden states, the same on every rank.
        weight_VC: This rank's rows of the head, without padding; may be empty ([0, C]).
        targets_X: int64 targets in the whole vocabulary.
        first: Vocabulary id of this rank's first row.
        parallel: The ranks that hold the other rows.
        kernels: What runs it: `auto` takes Triton where it can, `triton` insists on it.
    """
    hidden_XC = copy_to_ranks(hidden_XC, parallel)
    local = linear_logsumexp(hidden_XC, weight_VC, targets_X - first, implementation=kernels)
    # One collective for both: [ranks, 2, X].
    lse_X, target_X = gather_from_ranks(torch.stack(local), parallel).unbind(1)
    return lse_X.logsumexp(dim=0) - target_X.sum(dim=0)
