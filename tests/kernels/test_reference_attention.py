"""The reference attention against a softmax written out pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megacog_kernels.attention import text_attention
from megacog_kernels.attention.reference import video_attention
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid, dense_mask

GRID = VideoGrid(3, 3, 2)
SPACES = [Space(), Space("frame"), Space("local3d", (3, 1)), Space("shifted_window", (2, 2), shift=(1, 1))]
ORDERS = [Order.sequential(3), Order.interpolation(3), Order((0, 0, 1), (True, True, False))]


def inputs(valid_counts: list[int], length: int = 4) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(valid_counts), GRID.tokens, 2, 8)] * 3 + [(len(valid_counts), length, 2, 8)] * 2
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    valid = torch.arange(length)[None] >= length - torch.tensor(valid_counts)[:, None]
    return tensors, valid


def written_out(
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, valid: Tensor, mask: MaskSpec
) -> Tensor:
    allowed = torch.from_numpy(dense_mask(mask, GRID).copy())
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for row in range(q.shape[1]):
            for n in range(q.shape[2]):
                keys = torch.cat([text_k[b, valid[b], n], k[b, allowed[row], n]])
                values = torch.cat([text_v[b, valid[b], n], v[b, allowed[row], n]])
                weights = torch.softmax(keys @ q[b, row, n] / math.sqrt(q.shape[-1]), dim=0)
                out[b, row, n] = weights @ values
    return out


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.kind)
@pytest.mark.parametrize("order", ORDERS, ids=["sequential", "interpolation", "prefix"])
def test_video_attention_is_one_softmax_over_text_and_visible_frames(space: Space, order: Order) -> None:
    (q, k, v, text_k, text_v), valid = inputs([4, 1, 0])
    mask = MaskSpec(order, space)
    out = video_attention(q, k, v, text_k, text_v, valid, mask, GRID)
    torch.testing.assert_close(out, written_out(q, k, v, text_k, text_v, valid, mask), rtol=1e-12, atol=1e-12)


def test_relaxed_softmax_of_the_release_equals_plain_softmax() -> None:
    """PB-relax divides scores by 16, subtracts a maximum and multiplies by 16 again."""
    scores = torch.randn(5, 7, dtype=torch.float64) * 8
    relaxed = (scores / 16 - (scores / 16).max()) * 16
    torch.testing.assert_close(relaxed.softmax(-1), scores.softmax(-1), rtol=1e-12, atol=1e-14)


def test_text_attention_ignores_padding_and_all_padding_gives_zeros_with_finite_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))
    valid = torch.tensor([[False, True, True, True], [False] * 4])
    out = text_attention(q, k, v, valid)
    out.sum().backward()
    alone = text_attention(q[:1, 1:], k[:1, 1:], v[:1, 1:], valid[:1, 1:])
    torch.testing.assert_close(out[:1, 1:], alone)
    assert (out[1] == 0).all()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (q, k, v))


def test_rows_that_do_not_fit_the_grid_are_refused() -> None:
    (q, k, v, text_k, text_v), valid = inputs([4])
    with pytest.raises(ValueError, match="the grid"):
        video_attention(q[:, 1:], k, v, text_k, text_v, valid, MaskSpec(Order.sequential(3), Space()), GRID)
