from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

from megacog.metrics.profile import KINDS, kind_of, optimizer_range, profile_step

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


def test_time_that_runs_no_operator_counts_for_nothing() -> None:
    def step() -> None:
        torch.ones(10).add_(1)
        time.sleep(0.05)

    found = profile_step(step, CPU)
    assert found.wall >= 0.05 > sum(found.seconds.values())
