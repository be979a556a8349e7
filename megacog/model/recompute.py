"""What a layer keeps of its forward pass, and what its backward pass computes again.

- `none` keeps all that gradients need.
- `selective` keeps a layer's input and what is small for the work behind it: the outputs of attention and of
  row-parallel linears (`megacog_kernels.keep`). Computed again are norms, q|k|v, gate, the MLP's first linear and GELU.
  Nothing is summed over ranks twice.
- `full` keeps a layer's input only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar, cast

from torch.utils.checkpoint import checkpoint

from megacog.config.schema import Checkpointing
from megacog_kernels.keep import KeptResults

T = TypeVar("T")


def run_layer(policy: Checkpointing, function: Callable[..., T], *arguments: object) -> T:
    """function(*arguments), keeping of it what the policy says."""
    if policy == "none":
        return function(*arguments)
    if policy == "full":
        return cast(T, checkpoint(function, *arguments, use_reentrant=False))
    results = KeptResults()

    def both_runs() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return results.first_run(), results.second_run()

    return cast(T, checkpoint(function, *arguments, use_reentrant=False, context_fn=both_runs))
