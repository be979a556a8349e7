"""Linear head + cross entropy without whole logits."""

from megacog_kernels.cross_entropy.ops import LinearLogSumExp, linear_logsumexp

__all__ = ["LinearLogSumExp", "linear_logsumexp"]
