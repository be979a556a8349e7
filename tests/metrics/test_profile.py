from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from megacog.metrics.profile import KINDS, kind_of, optimizer_range, profile_step
from megacog.parallel.fp8 import as_held, input_gradient, weight_product
from megacog_kernels.fp8 import fp8_product, quantize_rows
from megacog_kernels.products import add_product, linear, multiply, product

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("operators", "kind"),
    [
        (("aten::addmm", "aten::linear"), "gemm"),
        (("aten::_scaled_mm", "megacog::product"), "gemm"),
        (("aten::mm", "AddmmBackward0"), "gemm"),
        (("aten::mm", "megacog::linear_logsumexp_backward"), "head"),
        (("megacog::attend_backward", "AttendBackward"), "attention"),
        (("aten::bmm", "aten::scaled_dot_product_attention"), "attention"),
        (("aten::addmm", "aten::linear", "ReferenceAttentionBackward"), "gemm"),  # recomputed in a backward pass
        (("aten::_foreach_add_", "Optimizer.step#AdamW.step", "megacog::optimizer"), "optimizer"),
        (("aten::gelu",), "pointwise"),
    ],
)
def test_operators_are_told_apart_by_what_they_run_in(operators: tuple[str, ...], kind: str) -> None:
    assert kind_of(operators) == kind


def test_the_time_of_a_step_is_shared_out() -> None:
    weight = torch.randn(400, 400, requires_grad=True)
    q = torch.randn(2, 4, 64, 16)

    def step() -> None:
        (F.gelu(torch.randn(400, 400) @ weight)).sum().backward()
        F.scaled_dot_product_attention(q, q, q)
        with optimizer_range(), torch.no_grad():
            weight.sub_(weight.grad)

    step()
    found = profile_step(step, CPU, largest=3)
    assert set(found.seconds) == set(KINDS) and found.unknown == 0.0
    assert all(found.seconds[kind] > 0 for kind in ("gemm", "attention", "pointwise", "optimizer"))
    assert found.seconds["head"] == 0.0
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert 0 < sum(found.seconds.values()) <= found.wall
    assert len(found.largest) == 3 and found.largest[0][1] >= found.largest[1][1]


_LEFT, _RIGHT = torch.randn(256, 256), torch.randn(256, 256)
_HELD = as_held(_RIGHT)
_CODES = quantize_rows(_LEFT)[0]
_ONES = torch.ones(256, 1)


@pytest.mark.parametrize(
    "multiply_once",
    [
        lambda: linear(_LEFT, _RIGHT),
        lambda: linear(_LEFT, _RIGHT, _RIGHT[0]),
        lambda: multiply(_LEFT, _RIGHT),
        lambda: product(_LEFT, _RIGHT, out=torch.empty(256, 256)),
        lambda: add_product(_LEFT, _RIGHT, torch.zeros(256, 256)),
        lambda: fp8_product(_CODES, _ONES, _CODES, _ONES[:, 0]),
        lambda: weight_product(_LEFT.bfloat16(), *_HELD, _RIGHT[0].bfloat16()),
        lambda: input_gradient(_LEFT.bfloat16(), *_HELD),
    ],
    ids=["linear", "with a bias", "multiply", "product", "add_product", "fp8", "fp8 weight", "fp8 gradient"],
)
def test_every_product_that_layers_make_counts_as_one(multiply_once: Callable[[], object]) -> None:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        multiply_once()
    products = {event.name for event in recorded.events() if "mm" in event.name}
    assert products and all(kind_of((name,)) == "gemm" for name in products), products


def test_time_that_runs_no_operator_counts_for_nothing() -> None:
    def step() -> None:
        torch.ones(10).add_(1)
        time.sleep(0.5)

    found = profile_step(step, CPU)
    assert found.wall >= 0.5 > sum(found.seconds.values())
