"""Quantization to e4m3 and products of quantized matrices: compiled on GPUs, interpreted elsewhere."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from attention_cases import DEVICE
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megacog_kernels.dispatch import Implementation
from megacog_kernels.fp8 import fp8_product, quantize_rows, reference, transposed
from megacog_kernels.fp8.calls import WIDEST

FAST = settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate], print_blob=True)
BOTH: list[Implementation] = ["reference", "triton"]
HALF_STEP = 2**-4
"""Of e4m3's 3 stored mantissa bits, relative."""

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="e4m3 needs compute capability 8.9"
)


@pytest.fixture(autouse=True, scope="module")
def _the_interpreter_rounds_to_e4m3_as_devices_do() -> Any:
    """Triton's interpreter loses the carry from mantissa to exponent (125.5 becomes 64); torch does the rounding."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.float8e4nv:
            rounded = torch.from_numpy(data.copy()).float().to(torch.float8_e4m3fn)
            return rounded.view(torch.uint8).numpy()
        return original(data, source, target, rounding)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def value(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float() * scale


@FAST
@given(st.integers(0, 9), st.integers(1, 70), st.integers(-60, 60), st.booleans(), st.integers(0, 2**31))
def test_elements_are_within_half_a_step_of_their_own_size(
    rows: int, width: int, exponent: int, scaled: bool, seed: int
) -> None:
    x = random(rows, width, seed=seed) * 2.0**exponent
    columns = random(width, seed=seed + 1, dtype=torch.float32).abs() + 0.1 if scaled else None
    wanted = x.float() * (1 if columns is None else columns)
    for implementation in BOTH:
        codes, scale = quantize_rows(x, columns, implementation=implementation)
        assert codes.dtype == torch.float8_e4m3fn and scale.shape == (rows, 1)
        # Below 2^-6 of the scale e4m3 has steps of 2^-9.
        bound = torch.maximum(wanted.abs() * HALF_STEP, scale * 2.0**-10)
        assert bool(((value(codes, scale) - wanted).abs() <= bound).all())


@FAST
@given(st.integers(1, 6), st.sampled_from([1, 5, 64, 100]), st.booleans(), st.integers(0, 2**31))
def test_kernel_and_reference_agree_bitwise(rows: int, width: int, scaled: bool, seed: int) -> None:
    x = random(rows, width, seed=seed) * torch.logspace(-3, 3, rows, base=2.0**20, device=DEVICE).bfloat16()[:, None]
    columns = random(width, seed=seed + 1, dtype=torch.float32) if scaled else None
    one, other = (quantize_rows(x, columns, implementation=implementation) for implementation in BOTH)
    assert torch.equal(one[0].view(torch.uint8), other[0].view(torch.uint8)) and torch.equal(one[1], other[1])


def test_scales_are_the_least_powers_of_two_that_fit() -> None:
    amax = torch.tensor([448.0, 448.0001, 449.0, 224.0, 224.1, 1.0, 1.75, 1.76, 3e38, 1e-38, 0.0])
    scale = reference.power_of_two_scale(amax)
    assert bool((scale.view(torch.int32) & 0x7FFFFF == 0).all())
    assert bool((amax / scale <= 448).all())
    ordinary = scale > 2.0**-126
    assert bool((amax / (scale / 2) > 448)[ordinary].all()) and not ordinary[-1]


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_rows_that_are_not_finite_show(implementation: Implementation, bad: float) -> None:
    x = random(3, 32)
    x[1, 7] = bad
    codes, scale = quantize_rows(x, implementation=implementation)
    assert value(codes, scale).isnan().all(1).tolist() == [False, True, False]
    product = fp8_product(codes, scale, *(part.clone() for part in weights(16, 32)))
    assert product.isnan().all(1).tolist() == [False, True, False]


def weights(rows: int, width: int) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_rows(random(rows, width, seed=5), implementation="reference")
    return codes, scale.flatten()


@pytest.mark.parametrize("implementation", BOTH)
def test_cut_rows_have_the_same_values(implementation: Implementation) -> None:
    x = random(4, 96)
    whole = value(*quantize_rows(x, implementation=implementation))
    parts = [value(*quantize_rows(part, implementation=implementation)) for part in x.chunk(3, 1)]
    large = x.float().abs() > whole.abs().amax(1, keepdim=True) * 2**-14
    assert torch.equal(torch.cat(parts, 1)[large], whole[large]) and large.float().mean() > 0.9


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (70, 130), (3, 200)])
@pytest.mark.parametrize("implementation", BOTH)
def test_the_transpose(implementation: Implementation, shape: tuple[int, int]) -> None:
    codes = quantize_rows(random(*shape), implementation="reference")[0]
    turned = transposed(codes, implementation=implementation)
    assert turned.dtype == codes.dtype and turned.is_contiguous()
    assert torch.equal(turned.view(torch.uint8), codes.view(torch.uint8).t())


@pytest.mark.parametrize("rows", [0, 1, 2, 37])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_is_that_of_the_quantized_values(rows: int, biased: bool) -> None:
    a, scale_a = quantize_rows(random(rows, 64, seed=1))
    b, scale_b = weights(48, 64)
    bias = random(48, seed=3) if biased else None
    wanted = value(a, scale_a).double() @ value(b, scale_b[:, None]).double().t()
    wanted = wanted if bias is None else wanted + bias
    mine = fp8_product(a, scale_a, b, scale_b, bias, fast=False)
    assert mine.dtype == torch.bfloat16 and mine.shape == (rows, 48)
    assert bool(((mine - wanted).abs() <= 2**-7 * wanted.abs() + 1e-3).all())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="rows and columns"):
        quantize_rows(random(3, 4, 5))
    with pytest.raises(ValueError, match="columns has shape"):
        quantize_rows(random(3, 4), random(3, dtype=torch.float32))
    with pytest.raises(ValueError, match="longer than"):
        quantize_rows(random(1, WIDEST + 1), implementation="triton")
