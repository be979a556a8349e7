"""Sampling: the distributions are right and every row's stream is its own."""

from __future__ import annotations

import pytest
import torch

from megacog.generation.sampling import (
    draw_uniforms,
    guide,
    keep_top_k,
    keep_top_p,
    row_generator,
    row_seed,
    sample_codes,
)

DRAWS = 40_000
NEG_INF = float("-inf")


def shares(logits: list[float], **settings: object) -> torch.Tensor:
    """How often each code is drawn."""
    uniform_B = draw_uniforms([row_generator("shares")], DRAWS)[0]
    codes_B = sample_codes(torch.tensor([logits]).expand(DRAWS, -1), uniform_B, **settings)  # type: ignore[arg-type]
    return torch.bincount(codes_B, minlength=len(logits)) / DRAWS


def test_codes_are_drawn_with_their_probabilities() -> None:
    wanted = torch.tensor([0.5, 0.3, 0.15, 0.05])
    # Standard error of a share is at most 0.0025.
    torch.testing.assert_close(shares(wanted.log().tolist()), wanted, atol=0.01, rtol=0)


def test_temperature_sharpens_before_top_k_and_top_p_cut() -> None:
    probability = torch.tensor([0.4, 0.35, 0.2, 0.05])
    squared = probability**2 / (probability**2).sum()
    torch.testing.assert_close(shares(probability.log().tolist(), temperature=0.5), squared, atol=0.01, rtol=0)
    top_two = torch.tensor([0.4, 0.35, 0, 0]) / 0.75
    torch.testing.assert_close(shares(probability.log().tolist(), top_k=2), top_two, atol=0.01, rtol=0)
    # At temperature 0.5 the first code alone holds 0.47 and the first two 0.88.
    cut = torch.tensor([squared[0], squared[1], 0, 0]) / squared[:2].sum()
    torch.testing.assert_close(shares(probability.log().tolist(), temperature=0.5, top_p=0.8), cut, atol=0.01, rtol=0)


def test_top_k_keeps_ties_and_top_p_always_keeps_the_best() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert keep_top_k(logits, 1).tolist() == [[NEG_INF, 3.0, 3.0, NEG_INF]]
    assert keep_top_k(logits, 9).tolist() == logits.tolist()
    assert keep_top_p(torch.tensor([[0.0, 5.0, 1.0]]), 1e-9).tolist() == [[NEG_INF, 5.0, NEG_INF]]


def test_top_p_keeps_the_code_that_crosses_the_line() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert keep_top_p(logits, 0.6).isfinite().tolist() == [[True, True, False]]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_an_impossible_code_is_never_drawn_at_either_end(uniform: float) -> None:
    logits = torch.tensor([[NEG_INF, 0.0, 1.0, NEG_INF]])
    code = sample_codes(logits, torch.tensor([uniform], dtype=torch.float64))
    assert code.item() == (1 if uniform == 0.0 else 2)


def test_guidance_extrapolates_from_the_null_logits() -> None:
    conditional, null = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert guide(conditional, null, 3.0).tolist() == [[4.0, -2.0]]
    assert torch.equal(guide(conditional, null, 1.0), conditional)
    assert torch.equal(guide(conditional, null, 0.0), null)


def test_seeds_depend_on_every_part_of_the_key_and_on_nothing_else() -> None:
    assert row_seed("the digit 3", 7, 0, "base", 0) == 825077737217997266
    keys = [("a", 1, 0), ("a", 1, 1), ("a", 2, 0), ("b", 1, 0), ("a", 10), ("a1", 0)]
    assert len({row_seed(*key) for key in keys}) == len(keys)


def test_a_row_draws_the_same_numbers_in_any_company() -> None:
    alone = draw_uniforms([row_generator("b", 0)], 5)[0]
    together = draw_uniforms([row_generator(name, 0) for name in "abc"], 5)
    assert torch.equal(together[1], alone)
    assert not torch.equal(together[0], alone)
