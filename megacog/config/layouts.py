"""Which ways of sharing a run over ranks are admitted: those that a test proves equal to one rank.

The table of docs/training.md says the same with the tests' names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megacog.config.schema import ModelConfig, ParallelConfig, TrainConfig

TENSOR_SIZES = (1, 2, 4, 8)
"""Admitted values of `parallel.tensor`."""


def layout_problems(model: ModelConfig, train: TrainConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yield why the run cannot be shared as asked, and what to do, for every reason."""
    tensor, sequence = parallel.tensor, parallel.sequence
    if tensor not in TENSOR_SIZES:
        sizes = ", ".join(map(str, TENSOR_SIZES))
        yield f"parallel.tensor {tensor} is not one of the sizes that are proved, {sizes}; take one of these"
    for key, size, what, count in (
        ("tensor", tensor, "model.num_heads", model.num_heads),
        ("tensor", tensor, "the MLP width", model.ffn),
        ("sequence", sequence, "model.num_heads", model.num_heads),
        ("sequence", sequence, f"the {model.grid[0]} x {model.grid[1]} cells of a frame,", model.cells),
    ):
        if count % size:
            smaller = max(fewer for fewer in range(1, size) if count % fewer == 0)
            yield f"parallel.{key} {size} does not divide {what} {count}; {smaller} does"
    if tensor > 1 and sequence > 1:
        yield (
            f"parallel.tensor {tensor} with parallel.sequence {sequence} is not proved: both share the heads; "
            "set one of them to 1"
        )
    sides = {"hidden_size": model.hidden_size, "MLP width": model.ffn}
    odd = [name for name, side in sides.items() if train.base_precision and side % (16 * tensor)]
    if odd:
        yield (
            "train.base_precision fp8 needs matrices whose sides are multiples of 16 on every rank: model "
            f"{' and '.join(odd)} must be multiples of 16 x parallel.tensor {tensor}"
        )
    if train.engine == "torch":
        return
    if train.precision == "bf16" and train.zero_stage == 0:
        yield (
            "train.zero_stage 0 with train.precision bf16 gives wrong gradient norms and losses in DeepSpeed; "
            "use zero_stage 1 or precision fp32"
        )
    if train.zero_stage == 3 and tensor > 1:
        yield (
            f"train.zero_stage 3 with parallel.tensor {tensor} would gather weights that are cut already, in every "
            "layer; use zero_stage 2, or parallel.tensor 1"
        )
