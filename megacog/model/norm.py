"""The model's layernorms, fused with the residual sums between them.

A module's weights are used while its own `forward` runs, so that parameter hooks (ZeRO 3) see them: where
two norms are fused, the second one's forward runs inside the first one's. Tensors are handed over by
position, because those hooks look at nothing else.

Legend: B batch, R rows, C width.
"""

from __future__ import annotations

from torch import Tensor, nn

from megacog_kernels.dispatch import Implementation
from megacog_kernels.norm import layer_norm, residual_norm, sandwich_norm


class _Norm(nn.LayerNorm):
    def __init__(self, width: int, eps: float, kernels: Implementation) -> None:
        super().__init__(width, eps)
        self.kernels: Implementation = kernels


class LayerNorm(_Norm):
    """A norm of the residual stream: input, post-attention and final layernorm."""

    def forward(  # type: ignore[override]
        self, x: Tensor, branch_BRC: Tensor | None = None, *, after: BranchNorm | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """norm(x) [..., C]; or, called by the norm before it, x + after(branch) and the norm of that."""
        if branch_BRC is None or after is None:
            return layer_norm(x, self.weight, self.bias, self.eps, implementation=self.kernels)
        weights = (after.weight, after.bias, self.weight, self.bias)
        return sandwich_norm(x, branch_BRC, *weights, self.eps, implementation=self.kernels)


class BranchNorm(_Norm):
    """The norm of a branch that joins the residual stream: third and fourth layernorm."""

    def forward(  # type: ignore[override]
        self, x_BRC: Tensor, branch_BRC: Tensor, *, then: LayerNorm | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x + norm(branch): [B, R, C]; with a norm that comes next, that sum and the next norm of it."""
        if then is None:
            own = (self.weight, self.bias)
            return residual_norm(x_BRC, branch_BRC, *own, self.eps, implementation=self.kernels)
        return then(x_BRC, branch_BRC, after=self)
