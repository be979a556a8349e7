"""The Triton kernels against attention written out in fp64: compiled on GPUs, interpreted elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import DEVICE, TOLERANCE, Case, error, expected, make_case
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import masks
from torch import Tensor

from megacog_kernels.attention.calls import (
    Inputs,
    Needed,
    backward_key_call,
    backward_query_call,
    forward_call,
    run_backward,
    run_forward,
)
from megacog_kernels.attention.configurations import Configuration, Configurations, configurations, is_dense
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid

SMALL = Configuration(16, 16, 4, 1, resident=1)
UNEVEN = Configuration(32, 16, 4, 1, resident=1)
ORDERS = [Order.interpolation(3), Order((0, 0, 1), (True, False, True))]
SPACES = [
    Space(),
    Space("frame"),
    Space("local3d", (3, 3)),
    Space("local3d", (3, 5), 2),
    Space("shifted_window", (3, 2), shift=(1, 1)),
]


def inputs_of(case: Case) -> Inputs:
    scale = 1 / math.sqrt(case.q.shape[3])
    frames = (case.q, case.k, case.v, case.text_k, case.text_v)
    return Inputs(*frames, case.text_valid, case.mask, case.grid, scale)


def nan_like(tensor: Tensor) -> Tensor:
    return torch.full(tensor.shape, float("nan"), dtype=tensor.dtype, device=tensor.device)


def check(case: Case, configuration: Configuration) -> None:
    """Forward and backward into outputs full of NaN, so that unwritten elements show."""
    inputs, wanted = inputs_of(case), expected(case)
    B, F, N, D = case.q.shape
    out, lse = nan_like(case.q), nan_like(wanted.lse.float())
    forward_call(inputs, out, lse, configuration).run()
    limit = TOLERANCE[case.q.dtype]
    assert error(out, wanted.out) < limit, "out"
    assert error(lse * math.log(2), wanted.lse) < limit, "lse"
    gradients = [nan_like(part) for part in case.tensors]
    delta = nan_like(lse)
    backward_query_call(inputs, out, case.grad_out, lse, delta, gradients[0], configuration).run()
    backward_key_call(inputs, case.grad_out, lse, delta, *gradients[1:3], configuration, text=False).run()
    if case.text_k.shape[1]:
        backward_key_call(inputs, case.grad_out, lse, delta, *gradients[3:], configuration, text=True).run()
    for name, got, want in zip(("q", "k", "v", "text_k", "text_v"), gradients, wanted.gradients, strict=True):
        if want.numel():
            assert error(got, want) < 3 * limit, f"gradient of {name}"


# Without shrinking, which takes minutes here: what is printed is small enough.
@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate], print_blob=True)
@given(
    masks(max_frames=9, max_tokens=50),
    st.sampled_from([0, 1, 5, 17]),
    st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    st.sampled_from([16, 32]),
    st.integers(0, 2**31),
)
def test_any_mask_grid_and_text(
    case: tuple[MaskSpec, VideoGrid], text: int, heads: tuple[int, int], head_dim: int, seed: int
) -> None:
    tensors = make_case(*case, text=text, heads=heads[0], key_heads=heads[1], head_dim=head_dim, seed=seed)
    check(tensors, SMALL if seed % 2 else UNEVEN)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_every_space_on_a_grid_of_several_tiles(space: Space) -> None:
    check(make_case(MaskSpec(Order.interpolation(3), space), VideoGrid(3, 3, 5), batch=2), SMALL)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies no bfloat16 matrices"),
        ),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_half_precision_and_both_head_dims(dtype: torch.dtype, head_dim: int) -> None:
    mask = MaskSpec(Order.sequential(2), Space("local3d", (3, 3)))
    check(make_case(mask, VideoGrid(2, 3, 5), heads=1, key_heads=1, head_dim=head_dim, dtype=dtype), SMALL)


SHIPPED = [
    (MaskSpec(Order.sequential(2), Space()), VideoGrid(2, 8, 9)),
    (MaskSpec(Order.interpolation(3), Space("shifted_window", (5, 5), shift=(2, 2))), VideoGrid(3, 9, 7)),
    (MaskSpec(Order((1, 0, 1, 0), (True, False, True, True)), Space("local3d", (5, 3), 3)), VideoGrid(4, 7, 6)),
    (MaskSpec(Order.sequential(2), Space("frame")), VideoGrid(2, 9, 9)),
]
CAPABILITIES = [torch.cuda.get_device_capability()[0]] if DEVICE == "cuda" else [8, 9, 10]
SHIPPED_DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


@pytest.mark.parametrize("dtype", SHIPPED_DTYPES)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_tiles_that_ship(dtype: torch.dtype, capability: int, head_dim: int) -> None:
    # One mask each when interpreted, which is slow: all masks of a head dim are seen over the capabilities.
    masks = SHIPPED if DEVICE == "cuda" else SHIPPED[capability - 8 :: 3]
    for mask, grid in masks:
        case = make_case(mask, grid, text=70, heads=2, key_heads=1, head_dim=head_dim, dtype=dtype, seed=head_dim)
        chosen, inputs = configurations(head_dim, dtype, is_dense(mask), capability), inputs_of(case)
        (out, lse), wanted = run_forward(inputs, chosen), expected(case)
        assert error(out, wanted.out) < TOLERANCE[dtype], (mask, "out")
        for deterministic in (True, False):
            got = run_backward(inputs, out, lse, case.grad_out, Needed(), chosen, deterministic)
            for name, want in zip(("q", "frame_k", "frame_v", "text_k", "text_v"), wanted.gradients, strict=True):
                assert error(getattr(got, name), want) < 3 * TOLERANCE[dtype], (mask, name, deterministic)


def test_a_grid_of_one_token_sees_itself_without_text() -> None:
    case = make_case(MaskSpec(Order.sequential(1), Space()), VideoGrid(1, 1, 1), text=0)
    check(case, SMALL)
    out, _ = run_forward(inputs_of(case), Configurations(SMALL, SMALL, SMALL))
    torch.testing.assert_close(out, case.v)


def test_text_that_is_all_padding_is_as_no_text() -> None:
    mask, grid = MaskSpec(Order.sequential(2), Space()), VideoGrid(2, 3, 3)
    case = make_case(mask, grid, text=4)
    case.text_valid[:] = False
    check(case, SMALL)
    chosen = Configurations(SMALL, SMALL, SMALL)
    inputs = inputs_of(case)
    got = run_backward(inputs, *run_forward(inputs, chosen), case.grad_out, Needed(), chosen, deterministic=True)
    assert got.text_k is not None and not got.text_k.any()


def test_gradients_are_bitwise_the_same_in_every_run() -> None:
    case = make_case(MaskSpec(Order.interpolation(3), Space("shifted_window", (2, 2))), VideoGrid(3, 4, 4))
    chosen, inputs = Configurations(SMALL, SMALL, SMALL), inputs_of(case)
    out, lse = run_forward(inputs, chosen)
    runs = [run_backward(inputs, out, lse, case.grad_out, Needed(), chosen, deterministic=True) for _ in range(3)]
    for name in ("q", "frame_k", "frame_v", "text_k", "text_v"):
        assert all(torch.equal(getattr(run, name), getattr(runs[0], name)) for run in runs)


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=["simple", "mixed"])
def test_gradients_summed_in_any_order_are_right(space: Space, order: Order) -> None:
    case = make_case(MaskSpec(order, space), VideoGrid(3, 3, 4), heads=2, key_heads=1)
    chosen, inputs, wanted = Configurations(SMALL, UNEVEN, SMALL), inputs_of(case), expected(case)
    got = run_backward(inputs, *run_forward(inputs, chosen), case.grad_out, Needed(), chosen, deterministic=False)
    for name, want in zip(("q", "frame_k", "frame_v", "text_k", "text_v"), wanted.gradients, strict=True):
        gradient = getattr(got, name)
        assert gradient.dtype == case.q.dtype and error(gradient, want) < 3e-5, name


def test_a_tensor_beyond_32_bit_offsets_is_refused() -> None:
    case = make_case(MaskSpec(Order.sequential(1), Space()), VideoGrid(1, 2, 2))
    for strides in ((2**33, 2**30, 16, 1), (2**33, 16, 2**31, 1)):
        case.q = torch.empty_strided((1, 4, 2, 16), strides, device="meta")
        with pytest.raises(ValueError, match=r"q \(1, 4, 2, 16\) spans"):
            forward_call(inputs_of(case), case.k, case.k, SMALL)
