"""The fused norms against fp64: compiled on GPUs, interpreted elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_cases import DEVICE, TOLERANCE, error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from uninitialized import filled_with_nan

from megacog_kernels import dispatch
from megacog_kernels.launch import Call
from megacog_kernels.norm import layer_norm, residual_norm, sandwich_norm
from megacog_kernels.norm.calls import MAX_WIDTH, ROWS_SUMMED

EPS = 1e-2
"""Large, so that rows of few channels do not blow rounding errors up."""
OPS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "layer_norm": (layer_norm, ("y", "weight_b", "bias_b")),
    "residual_norm": (residual_norm, ("x", "y", "weight_a", "bias_a")),
    "sandwich_norm": (sandwich_norm, ("x", "y", "weight_a", "bias_a", "weight_b", "bias_b")),
}
"""By name: the op, and what it takes of x, y, and the parameters of norms a and b."""


@pytest.fixture(autouse=True, scope="module")
def _unwritten_elements_show() -> Iterator[None]:
    with filled_with_nan():
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every launch of a kernel, as it happens."""
    calls: list[Call] = []
    run = Call.run
    monkeypatch.setattr(Call, "run", lambda call: (calls.append(call), run(call))[1])
    return calls


def tensors(op: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """What the op takes, with a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)

    def random(name: str) -> Tensor:
        value = torch.randn(shape if name in "xy" else shape[-1:], generator=generator) + 0.5
        return value.to(DEVICE, dtype)

    return {name: random(name) for name in OPS[op][1]}


def written_out(given: dict[str, Tensor]) -> list[Tensor]:
    """The op's outputs, step by step."""

    def norm(value: Tensor, which: str) -> Tensor:
        centered = value - value.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + EPS).sqrt()
        return scaled * given[f"weight_{which}"] + given[f"bias_{which}"]

    if "x" not in given:
        return [norm(given["y"], "b")]
    out = given["x"] + norm(given["y"], "a")
    return [out, norm(out, "b")] if "weight_b" in given else [out]


def outputs(op: str, given: dict[str, Tensor], implementation: str = "triton") -> list[Tensor]:
    got = OPS[op][0](*given.values(), EPS, implementation=implementation)
    return [got] if isinstance(got, Tensor) else list(got)


def results(op: str, given: dict[str, Tensor], needed: set[str], run: Callable[..., list[Tensor]]) -> list[Tensor]:
    """Outputs of `run`, then the gradients of what is needed, for fixed gradients of the outputs."""
    leaves = {name: part.detach().requires_grad_(name in needed) for name, part in given.items()}
    got = run(leaves)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(part.shape, generator=generator).to(given["y"].dtype).to(part) for part in got]
    asked = [leaves[name] for name in leaves if name in needed]
    found = [part for part in got if part.requires_grad]
    kept = [grad for grad, part in zip(grads, got, strict=True) if part.requires_grad]
    made = list(torch.autograd.grad(found, asked, kept)) if asked else []
    return [part.detach() for part in got] + made


def check(op: str, shape: tuple[int, ...], dtype: torch.dtype, needed: set[str], seed: int = 0) -> None:
    given = tensors(op, shape, dtype, seed)
    wanted = results(op, {name: part.double() for name, part in given.items()}, needed, written_out)
    got = results(op, given, needed, lambda leaves: outputs(op, leaves))
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == dtype and mine.shape == theirs.shape
        assert error(mine, theirs) < 3 * TOLERANCE[dtype]


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate], print_blob=True)
@given(
    st.sampled_from(list(OPS)), st.integers(0, 4), st.one_of(st.integers(1, 70), st.just(3072)),
    st.integers(0, 63), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_and_any_gradients(op: str, rows: int, width: int, wanted: int, seed: int) -> None:
    needed = {name for place, name in enumerate(OPS[op][1]) if wanted >> place & 1}
    check(op, (rows, width), torch.float32, needed, seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_half_precision(op: str, dtype: torch.dtype) -> None:
    check(op, (3, 192), dtype, set(OPS[op][1]))


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_weights_over_several_partial_sums(op: str) -> None:
    check(op, (2, ROWS_SUMMED // 2 + 2, 24), torch.float32, set(OPS[op][1]))


def test_the_widest_row() -> None:
    check("sandwich_norm", (1, MAX_WIDTH), torch.float32, set(OPS["sandwich_norm"][1]))


def test_rows_that_are_not_adjacent() -> None:
    given = tensors("sandwich_norm", (2, 3, 24))
    wanted = outputs("sandwich_norm", given)
    spread = {name: part.mT.contiguous().mT if part.dim() > 1 else part for name, part in given.items()}
    assert not spread["x"].is_contiguous()
    assert all(map(torch.equal, outputs("sandwich_norm", spread), wanted))


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_bitwise_the_same_in_every_run(op: str) -> None:
    given = tensors(op, (ROWS_SUMMED + 3, 40))
    runs = [results(op, given, set(given), lambda leaves: outputs(op, leaves)) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("op", OPS)
def test_frozen_norms_do_nothing_for_their_weights(op: str, launched: list[Call]) -> None:
    given = tensors(op, (3, 16))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: (saved.append(part), part)[1], lambda part: part):
        results(op, given, {"x", "y"} & set(given), lambda leaves: outputs(op, leaves))
    assert [call.kernel.fn.__name__ for call in launched] == ["norm_forward", "norm_backward"]
    assert not launched[1].constants["GRAD_A"] and not launched[1].constants["GRAD_B"]
    assert launched[1].arguments["partial"].numel() == 0
    rows = [part for part in saved if part.shape == (3, 16)]
    assert len(rows) == (2 if op == "sandwich_norm" else 1)
    assert sum(part.numel() for part in saved) <= len(rows) * 3 * 16 + 2 * 16 + 3 * 4  # weights and statistics


def test_only_what_is_needed_is_launched(launched: list[Call]) -> None:
    given = tensors("sandwich_norm", (2, 16))
    with torch.no_grad():
        outputs("sandwich_norm", given)
    assert len(launched) == 1
    launched.clear()
    results("sandwich_norm", given, {"y"}, lambda leaves: outputs("sandwich_norm", leaves))
    constants = launched[1].constants
    assert (constants["GRAD_X"], constants["GRAD_Y"]) == (False, True)
    launched.clear()
    short = tensors("residual_norm", (2, 16))
    results("residual_norm", short, {"x"}, lambda leaves: outputs("residual_norm", leaves))
    assert len(launched) == 1, "the gradient of x is that of the output"


def test_an_output_that_nobody_uses_has_no_gradient() -> None:
    given = tensors("sandwich_norm", (2, 16))
    for index in range(2):
        leaves = {name: part.clone().requires_grad_() for name, part in given.items()}
        exact = {name: part.double().detach().requires_grad_() for name, part in given.items()}
        got = torch.autograd.grad(outputs("sandwich_norm", leaves)[index].square().sum(), [leaves["x"], leaves["y"]])
        wanted = torch.autograd.grad(written_out(exact)[index].square().sum(), [exact["x"], exact["y"]])
        assert all(error(mine, theirs) < 1e-5 for mine, theirs in zip(got, wanted, strict=True))


def test_the_reference_is_bitwise_layernorm_and_sum() -> None:
    given = tensors("sandwich_norm", (4, 24), torch.bfloat16)
    x, y, weight_a, bias_a, weight_b, bias_b = given.values()
    out = x + F.layer_norm(y, (24,), weight_a, bias_a, EPS)
    normed = F.layer_norm(out, (24,), weight_b, bias_b, EPS)
    assert all(map(torch.equal, outputs("sandwich_norm", given, "reference"), (out, normed)))
    assert torch.equal(residual_norm(x, y, weight_a, bias_a, EPS, implementation="reference"), out)
    assert torch.equal(layer_norm(out, weight_b, bias_b, EPS, implementation="reference"), normed)


@pytest.mark.parametrize("op", OPS)
def test_the_operator_keeps_the_rules_of_operators(op: str) -> None:
    given = {name: part.requires_grad_() for name, part in tensors(op, (2, 3, 8)).items()}
    names = ("x", "y", "weight_a", "bias_a", "weight_b", "bias_b")
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if op == "sandwich_norm":  # the rest traces the same functions for all three, and takes seconds
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.megacog.norm.default, (*(given.get(name) for name in names), EPS), test_utils=tests)


@pytest.mark.parametrize("op", OPS)
def test_it_compiles_with_the_model_around_it(op: str) -> None:
    given = tensors(op, (2, 3, 16))

    def model(leaves: dict[str, Tensor]) -> list[Tensor]:
        return [part.sin() for part in outputs(op, leaves)]

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, *(results(op, given, set(given), run) for run in (model, compiled))))


def test_auto_says_what_runs_and_why(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._say.cache_clear()
    given = tensors("layer_norm", (2, 16))
    with caplog.at_level(logging.INFO, logger="megacog_kernels"):
        outputs("layer_norm", given, "auto")
    chosen = "triton, on" if DEVICE == "cuda" else "reference, because"
    assert [line for line in caplog.messages if f"layernorm on {DEVICE} (float32, width 16): {chosen}" in line]


def test_a_row_that_is_too_wide_runs_the_reference_or_is_refused() -> None:
    given = tensors("layer_norm", (1, MAX_WIDTH + 1))
    assert error(outputs("layer_norm", given, "auto")[0], written_out(given)[0]) < 1e-5
    with pytest.raises(ValueError, match="'triton' cannot run: the kernels know widths up to 8192, not 8193"):
        outputs("layer_norm", given)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_arguments_that_do_not_fit_are_named_with_their_shape(implementation: str) -> None:
    given = tensors("sandwich_norm", (2, 16))

    def refused(match: str, **changed: Tensor) -> None:
        with pytest.raises(ValueError, match=match):
            outputs("sandwich_norm", given | changed, implementation)

    refused(r"y has shape \(1, 16\), \(2, 16\) fits x \(2, 16\)", y=given["y"][:1])
    refused(r"weight_a has shape \(15,\), \(16,\) fits x", weight_a=given["weight_a"][:15])
    refused(r"bias_b has shape \(1, 16\)", bias_b=given["bias_b"][None])
    refused(r"bias_a \(16,\) is torch.float16 on", bias_a=given["bias_a"].half())
    refused(r"x \(2, 0\) has no channels", x=given["x"][:, :0])
    refused(r"x \(\) has no channels", x=given["x"][0, 0])
