"""Matrix products, also on CPUs that cannot compute in bf16."""

from __future__ import annotations

import pytest
import torch

from megacog_kernels import products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("knows_bf16", [True, False])
def test_products_are_those_of_torch_in_the_dtype_of_their_factors(
    dtype: torch.dtype, knows_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_cpu_knows_bf16", lambda: knows_bf16)
    x, weight, bias = torch.randn(3, 5, 7).to(dtype), torch.randn(4, 7).to(dtype), torch.randn(4).to(dtype)
    assert products.through_fp32(x) == (dtype == torch.bfloat16 and not knows_bf16)
    exact = x.double() @ weight.double().T
    rows, total = x.flatten(0, 1), torch.ones(15, 4, dtype=dtype)
    out = torch.empty(15, 4, dtype=dtype)
    products.product(rows, weight.T, out)
    products.add_product(rows, weight.T, total)
    found = [products.linear(x, weight), products.linear(x, weight, bias), products.multiply(x, weight.T)]
    wanted = [exact, exact + bias.double(), exact]
    for mine, theirs in zip([*found, out.view(3, 5, 4), total.view(3, 5, 4)], [*wanted, exact, exact + 1], strict=True):
        assert mine.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=8 * tolerance)


def test_products_on_other_devices_are_left_to_torch() -> None:
    assert not products.through_fp32(torch.empty(1, dtype=torch.bfloat16, device="meta"))
