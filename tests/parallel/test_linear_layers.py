"""Linear layers against torch's own, with gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megacog.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megacog.parallel.tensor import TensorParallel

WIDTH = 6


def filled(layer: ColumnParallelLinear | RowParallelLinear, trained: bool = True) -> nn.Module:
    for parameter in (layer.weight, layer.bias):
        nn.init.normal_(parameter)
        parameter.requires_grad_(trained)
    return layer


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Of a sum in which every element of every output weighs differently."""
    total = torch.stack([(out * torch.arange(1.0, out.numel() + 1).view_as(out).cos()).sum() for out in outputs]).sum()
    return torch.autograd.grad(total, leaves, allow_unused=True)


@pytest.mark.parametrize(
    "ranges", [[(0, 3)], [(1, 3)], [(0, 3), (1, 3)], [(0, 1), (1, 3), (1, 3)], [(0, 1)], [(2, 3), (2, 3)]], ids=str
)
@pytest.mark.parametrize("trained", [True, False])
def test_several_inputs_share_blocks_of_one_weight_and_its_gradient(
    ranges: list[tuple[int, int]], trained: bool
) -> None:
    layer = filled(ColumnParallelLinear(WIDTH, 3 * WIDTH, TensorParallel(), blocks=3), trained)
    inputs = [torch.randn(2, 3 + index, WIDTH, requires_grad=True) for index in range(len(ranges))]
    spans = [slice(first * WIDTH, end * WIDTH) for first, end in ranges]
    wanted = [F.linear(x, layer.weight[span], layer.bias[span]) for x, span in zip(inputs, spans, strict=True)]
    got = layer(*inputs, ranges=ranges)
    leaves = [*inputs, *(layer.parameters() if trained else ())]
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("trained", [True, False])
def test_alone_a_layer_is_an_ordinary_one_that_keeps_inputs_only_to_train(
    kind: type[ColumnParallelLinear] | type[RowParallelLinear], trained: bool
) -> None:
    layer = filled(kind(WIDTH, 2 * WIDTH, TensorParallel()), trained)
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept) == trained
    wanted = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(out, wanted)
    leaves = [x, *(layer.parameters() if trained else ())]
    for mine, theirs in zip(gradients([out], leaves), gradients([wanted], leaves), strict=True):
        torch.testing.assert_close(mine, theirs)
