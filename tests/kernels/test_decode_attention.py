"""Decoding against static buffers: every token's output is its row of the whole attention."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import DEVICE, Case, error, expected, make_case
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import masks

from megacog_kernels.attention import decode_attention
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid


def buffers(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Text, then a slot per frame token."""
    return torch.cat([case.text_k, case.k], dim=1), torch.cat([case.text_v, case.v], dim=1)


def decode(
    case: Case, tokens: torch.Tensor, implementation: str, splits: int = 2, text_bias: float = 0.0
) -> torch.Tensor:
    rows = tokens.long()[..., None, None].expand(-1, -1, *case.q.shape[2:])
    q = case.q.gather(1, rows)
    return decode_attention(
        q, *buffers(case), case.text_valid, tokens, case.mask, case.grid, text_bias=text_bias, splits=splits,
        implementation=implementation,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate], print_blob=True)
@given(masks(max_tokens=80), st.sampled_from([0, 3, 70]), st.sampled_from([1, 4]), st.integers(0, 2**31))
def test_a_token_gets_its_row_of_the_whole_attention(
    implementation: str, grid_case: tuple[MaskSpec, VideoGrid], text: int, splits: int, seed: int
) -> None:
    case = make_case(*grid_case, batch=2, text=text, heads=2, key_heads=1 + seed % 2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, case.grid.tokens, (2, 2), generator=generator).int().to(DEVICE)
    got, wanted = decode(case, tokens, implementation, splits), expected(case).out
    for sample in range(2):
        assert error(got[sample], wanted[sample, tokens[sample].long()]) < 1e-5


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("text", [3, 70])
@pytest.mark.parametrize("text_bias", [1.4, -0.7])
def test_a_text_bias_multiplies_the_weight_of_every_text_key(
    implementation: str, text: int, text_bias: float
) -> None:
    case = make_case(MaskSpec(Order.sequential(3), Space("local3d", (3, 3))), VideoGrid(3, 4, 5), batch=2, text=text)
    case.text_valid[:, -1] = True
    tokens = torch.tensor([[0, 27], [45, 59]], dtype=torch.int32, device=DEVICE)
    got = decode(case, tokens, implementation, splits=4, text_bias=text_bias)
    wanted = expected(case, text_factor=math.exp(text_bias)).out
    for sample in range(2):
        assert error(got[sample], wanted[sample, tokens[sample].long()]) < 1e-5
    assert error(got, decode(case, tokens, implementation, splits=4)) > 1e-2


def test_triton_never_reads_what_a_token_does_not_see() -> None:
    grid = VideoGrid(3, 4, 5)
    case = make_case(MaskSpec(Order.sequential(3), Space("local3d", (3, 3))), grid)
    case.text_valid[:] = True
    token = grid.cells + 7  # sees frame 0 and earlier cells of frame 1
    wanted = expected(case).out[:, token]
    case.k, case.v = case.k.clone(), case.v.clone()
    case.k[:, token + 1 :] = case.v[:, token + 1 :] = float("nan")
    got = decode(case, torch.tensor([[token]], dtype=torch.int32, device=DEVICE), "triton")
    assert error(got[:, 0], wanted) < 1e-5


def test_triton_compiles_with_the_model_around_it() -> None:
    case = make_case(MaskSpec(Order.sequential(2), Space()), VideoGrid(2, 2, 2))
    tokens = torch.tensor([[5]], dtype=torch.int32, device=DEVICE)
    compiled = torch.compile(lambda: decode(case, tokens, "triton") * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(), decode(case, tokens, "triton") * 2)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_without_new_tokens_there_is_nothing_to_do(implementation: str) -> None:
    case = make_case(MaskSpec(Order.sequential(2), Space()), VideoGrid(2, 2, 2))
    none = torch.zeros(1, 0, dtype=torch.int32, device=DEVICE)
    assert decode(case, none, implementation).shape == (1, 0, 2, 16)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_one_captured_graph_serves_every_position() -> None:
    case = make_case(MaskSpec(Order.sequential(2), Space("local3d", (3, 3))), VideoGrid(2, 4, 4))
    token = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    q, (k, v) = case.q[:, :1].clone(), buffers(case)
    arguments = (q, k, v, case.text_valid, token, case.mask, case.grid)
    decode_attention(*arguments, implementation="triton")  # compiles, and makes the tables
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(*arguments, implementation="triton")
    for position in (3, 17, 31):
        token.fill_(position)
        q.copy_(case.q[:, position : position + 1])
        graph.replay()
        assert error(out[:, 0], expected(case).out[:, position]) < 1e-5


def test_arguments_that_do_not_fit_are_named() -> None:
    case = make_case(MaskSpec(Order.sequential(2), Space()), VideoGrid(2, 2, 2))
    (k, v), tokens = buffers(case), torch.zeros(1, 8, dtype=torch.int32, device=DEVICE)
    good = (case.q, k, v, case.text_valid, tokens)
    for index, bad, match in (
        (1, k[:, 1:], r"k is \(1, 12, 2, 16\)"),
        (2, v.half(), "v is .* torch.float16"),
        (3, case.text_valid.int(), "text_valid is .* torch.int32"),
        (4, tokens.long(), "tokens is .* torch.int64"),
    ):
        arguments = [*good[:index], bad, *good[index + 1 :]]
        with pytest.raises(ValueError, match=match):
            decode_attention(*arguments, case.mask, case.grid)
    with pytest.raises(ValueError, match="splits is 3"):
        decode_attention(*good, case.mask, case.grid, splits=3)
