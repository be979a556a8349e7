"""Linear head + cross entropy against fp64 written out: kernels compiled on GPUs, interpreted elsewhere.

Legend: X rows, C width, V columns.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attention_cases import DEVICE, TOLERANCE, error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from uninitialized import filled_with_nan

from megacog_kernels import dispatch
from megacog_kernels.cross_entropy import LinearLogSumExp, calls, linear_logsumexp, reference
from megacog_kernels.cross_entropy.chunks import chunk_rows

IMPLEMENTATIONS = ["reference", "triton"]


@dataclass
class Case:
    """Inputs, and gradients of both outputs."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grad_lse: Tensor
    grad_target: Tensor

    def run(self, implementation: str, **options: Any) -> LinearLogSumExp:
        return linear_logsumexp(self.hidden, self.weight, self.targets, implementation=implementation, **options)

    def gradients(self, implementation: str, leaves: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.run(implementation, **options), leaves, [self.grad_lse, self.grad_target])


def make_case(X: int, V: int, C: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Random values; about a third of the targets are no columns, on either side."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    targets = torch.randint(-(V // 4) - 1, V + V // 4 + 1, (X,), generator=generator).to(DEVICE)
    hidden, weight = normal(X, C).to(dtype), (normal(V, C) * 2 * C**-0.5).to(dtype)
    return Case(hidden.requires_grad_(), weight.requires_grad_(), targets, normal(X), normal(X))


def expected(case: Case) -> tuple[Tensor, ...]:
    """lse, target and the gradients of hidden and weight, in fp64."""
    leaves = [part.detach().double().requires_grad_() for part in (case.hidden, case.weight)]
    logits = leaves[0] @ leaves[1].T
    V = logits.shape[1]
    mine = (case.targets >= 0) & (case.targets < V)
    one_hot = F.one_hot(case.targets.where(mine, V), V + 1)[:, :V]
    outputs = [logits.logsumexp(dim=1), (logits * one_hot).sum(dim=1)]
    gradients = torch.autograd.grad(outputs, leaves, [case.grad_lse.double(), case.grad_target.double()])
    return *(part.detach() for part in outputs), *gradients


def check(case: Case, implementation: str, **options: Any) -> None:
    outputs = case.run(implementation, **options)
    gradients = case.gradients(implementation, [case.hidden, case.weight], **options)
    assert all(part.dtype == torch.float32 for part in outputs)
    limit = TOLERANCE[case.hidden.dtype]
    names = ("lse", "target", "gradient of hidden", "gradient of weight")
    for name, got, want in zip(names, (*outputs, *gradients), expected(case), strict=True):
        assert got.shape == want.shape
        assert error(got, want) < (3 if "gradient" in name else 1) * limit, name


@settings(max_examples=25, deadline=None, print_blob=True)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**31))
def test_any_rows_columns_width_and_number_of_chunks(X: int, V: int, C: int, chunks: int, seed: int) -> None:
    chunk_bytes = -(-X // chunks) * -(-V // 64) * 64 * 4
    for implementation in IMPLEMENTATIONS:
        check(make_case(X, V, C, seed=seed), implementation, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(implementation: str, dtype: torch.dtype) -> None:
    check(make_case(70, 300, 32, dtype), implementation, chunk_bytes=2 * 320 * 32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_losses_and_gradients_equal_those_of_torch(implementation: str) -> None:
    case = make_case(40, 513, 16)
    case.targets = case.targets.clamp(0, 512)
    lse, target = case.run(implementation, chunk_bytes=4 * 576 * 16)
    loss = F.cross_entropy(case.hidden @ case.weight.T, case.targets, reduction="none")
    torch.testing.assert_close(lse - target, loss, rtol=1e-6, atol=1e-6)
    leaves = [case.hidden, case.weight]
    got, wanted = (torch.autograd.grad(part.mean(), leaves) for part in (lse - target, loss))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


# Tiles of 32: rows of several tiles, rows within one, and rows that fill their stride.
@pytest.mark.parametrize("V", [0, 1, 50, 64, 65, 193])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_row_kernels_fill_their_outputs_whatever_stands_between_rows(V: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(V)
    stride = max(64, -(-V // 64) * 64)
    buffer = torch.full((5, stride), float("nan"), dtype=dtype, device=DEVICE)
    logits = buffer[:, :V]
    logits.copy_(3 * torch.randn(5, V, generator=generator))
    targets = torch.tensor([0, V - 1, V, -1, V // 2], device=DEVICE)
    grads = torch.randn(2, 5, generator=generator).to(DEVICE)
    wanted_outputs, wanted = torch.zeros(2, 5, device=DEVICE), logits.clone()
    reference.summarize_rows(wanted, targets, *wanted_outputs)
    reference.differentiate_rows(wanted, targets, wanted_outputs[0], *grads)
    outputs = torch.full((2, 5), float("nan"), device=DEVICE)
    calls.summarize_call(logits, targets, *outputs, tile=32).run()
    torch.testing.assert_close(outputs, wanted_outputs, rtol=1e-6, atol=1e-6)
    calls.differentiate_call(logits, targets, outputs[0], *grads, tile=32).run()
    torch.testing.assert_close(logits, wanted)


@pytest.mark.parametrize("V", [21, 62])
def test_matrix_products_may_read_what_stands_beside_rows(V: int) -> None:
    """As oneDNN does on CPUs with bf16 arithmetic, where V is no multiple of four."""
    case = make_case(64, V, 32, torch.bfloat16)
    with filled_with_nan():
        check(case, "reference", chunk_bytes=2 * 64 * 40)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("X", "V"), [(0, 5), (5, 0), (0, 0)])
def test_without_rows_or_columns(implementation: str, X: int, V: int) -> None:
    case = make_case(X, V)
    lse, target = case.run(implementation)
    assert torch.equal(lse, torch.full_like(lse, float("-inf"))) and not target.any()
    hidden, weight = case.gradients(implementation, [case.hidden, case.weight])
    assert hidden.shape == case.hidden.shape and weight.shape == case.weight.shape
    assert not hidden.any() and not weight.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_do_not_overflow_and_broken_ones_show(implementation: str) -> None:
    case = make_case(6, 90)
    with torch.no_grad():
        case.hidden[0] *= 1e4
        case.hidden[1] = float("nan")
    lse, _ = case.run(implementation)
    assert lse[0].isfinite() and lse[0] > 1e3 and lse[1].isnan() and lse[2:].isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_the_gradient_that_is_needed_is_computed(
    implementation: str, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(30, 70)
    wanted = dict(zip(("hidden", "weight"), expected(case)[2:], strict=True))[trained]
    frozen = case.weight if trained == "hidden" else case.hidden
    frozen.requires_grad_(False)
    products = count_products(monkeypatch)
    leaf = case.hidden if trained == "hidden" else case.weight
    (got,) = case.gradients(implementation, [leaf])
    assert error(got, wanted) < 3e-5
    assert products == ["mm", "mm", "mm" if trained == "hidden" else "addmm"]  # logits, logits again, gradient


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of matrix products, as they happen."""
    found: list[str] = []
    mm, addmm = torch.mm, Tensor.addmm_
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (found.append("mm"), mm(*a, **k))[1])
    monkeypatch.setattr(Tensor, "addmm_", lambda *a, **k: (found.append("addmm"), addmm(*a, **k))[1])
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forward_keeps_its_inputs_and_a_number_per_row(implementation: str) -> None:
    case = make_case(64, 900, 4)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lse, _ = case.run(implementation)
        inputs = sum(part.untyped_storage().nbytes() for part in (case.hidden, case.weight, case.targets))
        assert sum(kept.values()) == inputs + lse.untyped_storage().nbytes()
        assert sum(kept.values()) < 64 * 900 * 4 / 4
        kept.clear()
        with torch.no_grad():
            case.run(implementation)
        assert not kept


def test_the_buffer_has_the_size_that_is_asked_for() -> None:
    assert chunk_rows(20000, torch.bfloat16, 64 * 2**20) == 1664  # 13 * 128
    assert chunk_rows(20000, torch.float32, 64 * 2**20) == 768
    assert chunk_rows(20000, torch.bfloat16, 10 * 40064) == 10
    assert chunk_rows(20000, torch.bfloat16, 1) == 1
    assert chunk_rows(0, torch.bfloat16, 2**20) > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_compiles_with_the_model_around_it(implementation: str) -> None:
    case = make_case(10, 70)

    def model(hidden: Tensor, weight: Tensor) -> Tensor:
        lse, target = linear_logsumexp(hidden * 2, weight, case.targets, implementation=implementation)
        return (lse - target).sin().sum()

    leaves = (case.hidden, case.weight)
    eager = torch.autograd.grad(model(*leaves), leaves)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, torch.autograd.grad(compiled(*leaves), leaves), eager))


@pytest.mark.parametrize("triton", [False, True])
def test_the_operator_keeps_the_rules_of_operators(triton: bool) -> None:
    case = make_case(5, 7)
    arguments = (case.hidden, case.weight, case.targets, 2, triton)
    torch.library.opcheck(torch.ops.megacog.linear_logsumexp.default, arguments)


def test_auto_says_once_what_runs_and_why(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._say.cache_clear()
    case = make_case(3, 7)
    with caplog.at_level(logging.INFO, logger="megacog_kernels"):
        for _ in range(2):
            case.run("auto")
    chosen = "triton, on" if DEVICE == "cuda" else "reference, because"
    assert len(caplog.messages) == 1
    assert f"linear cross entropy on {DEVICE} (float32, 7 columns): {chosen}" in caplog.messages[0]


def test_asking_for_triton_where_it_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(3, 7)
    case.hidden, case.weight = case.hidden.double(), case.weight.double()
    with pytest.raises(ValueError, match="implementation 'triton' cannot run: .*(float64|installed)"):
        case.run("triton")
    with pytest.raises(ValueError, match="'fast' is none of"):
        case.run("fast")


def test_arguments_that_do_not_fit_are_named_with_their_shape() -> None:
    case = make_case(3, 7)
    hidden, weight, targets = case.hidden, case.weight, case.targets

    def refused(match: str, *arguments: Tensor) -> None:
        with pytest.raises(ValueError, match=match):
            linear_logsumexp(*arguments)

    refused(r"hidden \(1, 3, 8\)", hidden[None], weight, targets)
    refused(r"weight \(7, 7\)", hidden, weight[:, 1:], targets)
    refused(r"targets is \(2,\)", hidden, weight, targets[1:])
    refused(r"targets is \(3,\) torch.int32", hidden, weight, targets.int())
    refused(r"weight \(7, 8\) is torch.float16", hidden, weight.half(), targets)
