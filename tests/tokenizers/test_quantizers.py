from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacog.tokenizers.quantizers import EMAVQ, FSQ


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=4))
def test_fsq_codes_and_levels_are_a_bijection(levels: list[int]) -> None:
    fsq = FSQ(tuple(levels))
    codes = torch.arange(math.prod(levels))
    channel_levels = fsq.levels_of_codes(codes)
    assert torch.equal(fsq.codes_of_levels(channel_levels), codes)
    assert len(channel_levels.unique(dim=0)) == math.prod(levels)
    assert (channel_levels.max(0).values == torch.tensor(levels) - 1).all() and (channel_levels >= 0).all()


def test_fsq_first_channel_counts_fastest() -> None:
    assert FSQ((8, 5, 5)).levels_of_codes(torch.tensor([0, 1, 8, 40, 199])).tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [7, 4, 4],
    ]


@pytest.mark.parametrize("levels", [(8, 5, 5), (2, 3), (4,)])
def test_fsq_reaches_every_code_and_vectors_match_codes(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    z = 3 * torch.randn(64, len(levels), 16, 16, generator=torch.Generator().manual_seed(0))
    quantized = fsq(z)
    assert len(quantized.codes_Bhw.unique()) == fsq.codebook_size
    assert torch.allclose(fsq.vectors(quantized.codes_Bhw), quantized.vectors_BDhw, atol=1e-6)
    assert quantized.vectors_BDhw.abs().max() <= 1.0
    assert quantized.commitment == 0


def test_fsq_gradient_passes_straight_through_the_rounding() -> None:
    fsq = FSQ((8, 5))
    z = torch.tensor([0.3, -0.2]).view(1, 2, 1, 1).requires_grad_()
    fsq(z).vectors_BDhw.sum().backward()
    # d/dz of the bounding function, as if there were no rounding.
    smooth = z.detach().clone().requires_grad_()
    bounded = fsq._bound(smooth.movedim(1, -1)) / torch.tensor([4, 2])
    bounded.sum().backward()
    assert z.grad is not None and smooth.grad is not None
    assert torch.allclose(z.grad, smooth.grad) and (z.grad > 0).all()


def test_ema_vq_takes_the_nearest_row() -> None:
    vq = EMAVQ(17, 4)
    vq.embedding_KD.copy_(torch.randn(17, 4, generator=torch.Generator().manual_seed(0)))
    z = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    quantized = vq(z)
    rows = z.movedim(1, -1).reshape(-1, 4)
    assert torch.equal(quantized.codes_Bhw.flatten(), torch.cdist(rows, vq.embedding_KD).argmin(1))
    assert torch.allclose(quantized.vectors_BDhw, vq.vectors(quantized.codes_Bhw), atol=1e-6)


def test_ema_vq_gradient_is_the_identity_plus_commitment() -> None:
    vq = EMAVQ(8, 2, beta=0.25)
    vq.embedding_KD.copy_(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    z = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    quantized = vq(z)
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((quantized.vectors_BDhw * upstream).sum(), z, retain_graph=True)
    assert torch.equal(gradient, upstream)
    (pull,) = torch.autograd.grad(quantized.commitment, z)
    rows = vq.vectors(quantized.codes_Bhw)
    assert torch.allclose(pull, 0.25 * 2 * (z - rows).detach() / z.numel())


def test_ema_vq_finds_clusters_and_restarts_dead_rows() -> None:
    vq = EMAVQ(16, 2)
    generator = torch.Generator().manual_seed(0)
    centers = 5 * torch.randn(16, 2, generator=generator)
    for _ in range(120):
        chosen = torch.randint(16, (256,), generator=generator)
        z = (centers[chosen] + 0.05 * torch.randn(256, 2, generator=generator)).T.reshape(1, 2, 16, 16)
        vq.update(z, vq(z).codes_Bhw, generator)
    distances = torch.cdist(centers, vq.embedding_KD).min(1).values
    assert distances.median() < 0.1
    # A row moved far away wins nothing; it must come back into use.
    vq.embedding_KD[0] = vq.embedding_sum_KD[0] = 1e3
    vq.cluster_size_K[0] = 1e-3
    vq.update(z, vq(z).codes_Bhw, generator)
    assert vq.embedding_KD[0].abs().max() < 50


def test_bad_shapes_are_errors() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        FSQ((8, 1))
    with pytest.raises(ValueError, match="codebook_size"):
        EMAVQ(1, 4)
