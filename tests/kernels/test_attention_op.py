"""The public attention: dispatch, gradients, compilation and bad input."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from attention_cases import DEVICE, Case, error, expected, make_case
from torch._subclasses.fake_tensor import FakeTensorMode

from megacog_kernels import dispatch
from megacog_kernels.attention import AttentionOutput, attention
from megacog_kernels.attention.dispatch import choose
from megacog_kernels.attention.ops import _encode, decode_mask
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid

GRID = VideoGrid(3, 2, 3)
WINDOW = MaskSpec(Order.interpolation(3), Space("shifted_window", (2, 2), shift=(1, 0)))
IMPLEMENTATIONS = ["reference", "triton"]


def attend(case: Case, implementation: str, **options: Any) -> AttentionOutput:
    q, k, v, text_k, text_v = case.tensors
    options = {"text_k": text_k, "text_v": text_v, "text_valid": case.text_valid} | options
    return attention(q, k, v, case.mask, case.grid, implementation=implementation, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_frames_text_lse_and_gradients(implementation: str) -> None:
    case = make_case(WINDOW, GRID, batch=2, heads=2, key_heads=1)
    leaves = [part.detach().requires_grad_() for part in case.tensors]
    case.q, case.k, case.v, case.text_k, case.text_v = leaves
    got, wanted = attend(case, implementation, text_q=case.text_q, return_lse=True), expected(case)
    assert got.text is not None and got.lse is not None and not got.lse.requires_grad
    assert error(got.frames, wanted.out) < 1e-5
    assert error(got.lse, wanted.lse) < 1e-5
    assert error(got.text, wanted.text_out) < 1e-5
    for mine, theirs in zip(torch.autograd.grad(got.frames, leaves, case.grad_out), wanted.gradients, strict=True):
        assert error(mine, theirs) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("space", [Space(), Space("frame"), WINDOW.space, Space("local3d", (3, 3))], ids=str)
@pytest.mark.parametrize("queries", [(1, 2, 3), (1, 3), (0,)], ids=str)
def test_a_part_of_the_frames_may_ask(implementation: str, space: Space, queries: tuple[int, ...]) -> None:
    grid = VideoGrid(4, 3, 3)
    case = make_case(MaskSpec(Order((0, 1, 0, 2), (True, False, True, False)), space), grid, batch=2)
    rows = [frame * grid.cells + cell for frame in queries for cell in range(grid.cells)]
    others = [row for row in range(grid.tokens) if row not in rows]
    case.grad_out[:, others] = 0
    wanted = expected(case)
    leaves = [part.detach()[:, rows] if index == 0 else part.detach() for index, part in enumerate(case.tensors)]
    leaves = [part.requires_grad_() for part in leaves]
    options = {"text_k": leaves[3], "text_v": leaves[4], "text_valid": case.text_valid, "query_frames": queries}
    out, _, lse = attention(*leaves[:3], case.mask, grid, implementation=implementation, return_lse=True, **options)
    assert lse is not None
    assert error(out, wanted.out[:, rows]) < 1e-5 and error(lse, wanted.lse[..., rows]) < 1e-5
    out = attention(*leaves[:3], case.mask, grid, implementation=implementation, **options).frames
    of_q, *others_wanted = wanted.gradients
    got = torch.autograd.grad(out, leaves, case.grad_out[:, rows])
    for mine, theirs in zip(got, [of_q[:, rows], *others_wanted], strict=True):
        assert error(mine, theirs) < 1e-5


@pytest.mark.parametrize("queries", [(), (2, 1), (1, 1), (1, 4), (0, 1)], ids=str)
def test_frames_that_cannot_ask_are_refused(queries: tuple[int, ...]) -> None:
    case = make_case(WINDOW, GRID)
    with pytest.raises(ValueError, match="query_frames|have others"):
        attention(case.q, case.k, case.v, WINDOW, GRID, query_frames=queries)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_text_queries_have_gradients(implementation: str) -> None:
    case = make_case(WINDOW, GRID)
    case.text_valid[:] = True
    case.text_valid[:, 0] = False
    leaves = [part.detach().requires_grad_() for part in (case.text_q, case.text_k, case.text_v)]
    case.text_q, case.text_k, case.text_v = leaves
    text = attend(case, implementation, text_q=case.text_q).text
    assert text is not None
    grad_out = torch.ones_like(text)
    got = torch.autograd.grad(text, leaves, grad_out)
    q, k, v = (part.detach().double().requires_grad_() for part in leaves)
    scores = torch.einsum("brnd,bknd->bnrk", q, k) / 4
    weights = scores.masked_fill(~case.text_valid[:, None, None], float("-inf")).softmax(-1)
    out = torch.einsum("bnrk,bknd->brnd", weights, v)
    for mine, theirs in zip(got, torch.autograd.grad(out, (q, k, v), grad_out.double()), strict=True):
        assert error(mine, theirs) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_text_and_with_a_scale_of_its_own(implementation: str) -> None:
    case = make_case(WINDOW, GRID, text=0)
    got = attention(case.q, case.k, case.v, WINDOW, GRID, scale=0.5, implementation=implementation)
    case.q = case.q * 2  # 0.5 instead of 1 / sqrt(16)
    assert error(got.frames, expected(case).out) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("text_bias", [1.4, -0.7])
def test_a_text_bias_multiplies_the_weight_of_every_text_key(implementation: str, text: int, text_bias: float) -> None:
    case = make_case(WINDOW, GRID, batch=3, heads=2, key_heads=1, text=text, seed=2)
    case.text_valid[0] = False  # a text of padding only
    case.text_valid[1:, -1:] = True
    got = attend(case, implementation, text_bias=text_bias, return_lse=True)
    wanted = expected(case, text_factor=math.exp(text_bias))
    assert got.lse is not None
    assert error(got.frames, wanted.out) < 1e-5
    assert error(got.lse, wanted.lse) < 1e-5
    assert text == 0 or error(got.frames[1:], attend(case, implementation).frames[1:]) > 1e-2


def test_a_text_bias_is_refused_where_gradients_are_wanted() -> None:
    case = make_case(WINDOW, GRID)
    case.q = case.q.clone().requires_grad_()
    with pytest.raises(ValueError, match="text_bias is 1.4, which gives no gradients"):
        attend(case, "auto", text_bias=1.4)
    with torch.no_grad():
        attend(case, "auto", text_bias=1.4)


def test_triton_runs_only_the_kernels_that_gradients_need(monkeypatch: pytest.MonkeyPatch) -> None:
    from megacog_kernels.launch import Call

    launched: list[tuple[str, bool | None]] = []
    run = Call.run

    def spy(call: Call) -> None:
        launched.append((call.kernel.fn.__name__, call.constants.get("TEXT")))
        run(call)

    monkeypatch.setattr(Call, "run", spy)
    case = make_case(WINDOW, GRID)
    case.q = case.q.detach().requires_grad_()
    attend(case, "triton").frames.sum().backward()
    assert [name for name, _ in launched] == ["attention_forward", "attention_backward_query"]
    launched.clear()
    case.k = case.k.detach().requires_grad_()
    attend(case, "triton").frames.sum().backward()
    assert launched[2:] == [("attention_backward_key", False)]
    assert case.text_k.grad is None and case.k.grad is not None


def test_not_being_deterministic_takes_the_kernel_of_five_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from megacog_kernels.attention.calls import Call

    launched: list[bool] = []
    run = Call.run

    def spy(call: Call) -> None:
        launched.append(call.constants.get("GRAD_Q"))
        run(call)

    monkeypatch.setattr(Call, "run", spy)
    case = make_case(WINDOW, GRID)
    leaves = [part.detach().requires_grad_() for part in case.tensors]
    case.q, case.k, case.v, case.text_k, case.text_v = leaves
    out = attend(case, "triton", deterministic=False).frames
    assert launched == [None]
    for mine, theirs in zip(torch.autograd.grad(out, leaves, case.grad_out), expected(case).gradients, strict=True):
        assert error(mine, theirs) < 1e-5
    assert launched[1:] == [False, True, True]  # delta only; then both key kernels add to the gradient of q


def test_triton_compiles_with_the_model_around_it() -> None:
    case = make_case(WINDOW, GRID)
    q = case.q.detach().requires_grad_()

    def model(q: torch.Tensor) -> torch.Tensor:
        case.q = q * 2
        return attend(case, "triton").frames.sin().sum()

    model(q).backward()
    eager, q.grad = q.grad, None
    torch.compile(model, backend="aot_eager", fullgraph=True)(q).backward()
    assert eager is not None and torch.equal(q.grad, eager)


def test_triton_operator_keeps_the_rules_of_operators() -> None:
    case = make_case(WINDOW, VideoGrid(3, 1, 2), text=2, heads=1, key_heads=1)
    case.mask = WINDOW
    code = _encode(WINDOW, VideoGrid(3, 1, 2))
    leaves = [part.detach().clone().requires_grad_() for part in case.tensors]
    torch.library.opcheck(
        torch.ops.megacog.attend.default,
        (*leaves, case.text_valid, code, 0.25, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_backward_operator_keeps_the_rules_of_operators(deterministic: bool) -> None:
    grid = VideoGrid(3, 1, 2)
    case = make_case(WINDOW, grid, text=2, heads=2, key_heads=1)
    q = case.q.transpose(1, 2).contiguous().transpose(1, 2)  # heads before rows in memory
    code, keys = _encode(WINDOW, grid), (case.k, case.v, case.text_k, case.text_v, case.text_valid)
    out, lse = torch.ops.megacog.attend(q, *keys, code, 0.25, deterministic)
    arguments = (case.grad_out, out, lse, q, *keys, code, 0.25, deterministic, [True, True, True])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.megacog.attend_backward.default, arguments, test_utils=tests)


def test_shapes_may_change_between_calls_of_a_compiled_model() -> None:
    compiled = torch.compile(
        lambda case: attend(case, "triton").frames, backend="aot_eager", dynamic=True, fullgraph=True
    )
    for heads in (1, 2, 3):
        case = make_case(WINDOW, GRID, heads=heads, key_heads=heads)
        assert torch.equal(compiled(case), attend(case, "triton").frames)


def test_fake_tensors_leave_nothing_behind() -> None:
    mask, grid = MaskSpec(Order.sequential(2), Space("local3d", (1, 3))), VideoGrid(2, 2, 3)
    case = make_case(mask, grid)
    with FakeTensorMode(allow_non_fake_inputs=True):
        attend(case, "reference", return_lse=True)
    assert error(attend(case, "reference").frames, expected(case).out) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_tokens_there_is_nothing_to_do(implementation: str) -> None:
    case = make_case(MaskSpec(Order.sequential(3), Space()), VideoGrid(3, 0, 3))
    got = attend(case, implementation, text_q=case.text_q, return_lse=True)
    assert got.frames.shape == (1, 0, 2, 16) and got.lse is not None and got.lse.shape == (1, 2, 0)
    assert got.text is not None and got.text.isfinite().all()
    no_text = make_case(WINDOW, GRID, text=0)
    got = attend(no_text, implementation, text_q=no_text.text_q)
    assert got.text is not None and got.text.shape == (1, 0, 2, 16)
    assert error(got.frames, expected(no_text).out) < 1e-5


def test_masks_survive_the_way_through_an_operator() -> None:
    spaces = [Space(), Space("frame"), Space("local3d", (3, 5)), Space("local3d", (3, 5), 2), WINDOW.space]
    for space in spaces:
        mask = MaskSpec(Order((0, 2, 1), (True, False, True)), space)
        assert decode_mask(_encode(mask, GRID)) == (mask, GRID, None)
        assert decode_mask(_encode(mask, GRID, (0, 2))) == (mask, GRID, (0, 2))


def test_auto_says_once_what_runs_and_why(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._say.cache_clear()
    case = make_case(WINDOW, GRID)
    with caplog.at_level(logging.INFO, logger="megacog_kernels"):
        for _ in range(2):
            attend(case, "auto")
    chosen = "triton, on" if DEVICE == "cuda" else "reference, because"
    assert len(caplog.messages) == 1
    assert f"attention on {DEVICE} (float32, head dim 16): {chosen}" in caplog.messages[0]


def test_asking_for_triton_where_it_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(WINDOW, GRID, head_dim=8)
    with pytest.raises(ValueError, match="implementation 'triton' cannot run: .*(head dims|installed)"):
        attend(case, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="cannot run: .*(type cpu|installed)"):
        choose("triton", torch.device("cpu"), torch.float32, 64)
    with pytest.raises(ValueError, match="'fast' is none of"):
        attend(case, "fast")


def test_arguments_that_do_not_fit_are_named_with_their_shape() -> None:
    case = make_case(WINDOW, GRID)
    q, k, v = case.q, case.k, case.v

    def refused(match: str, *tensors: torch.Tensor, mask: Any = WINDOW, grid: VideoGrid = GRID, **more: Any) -> None:
        with pytest.raises(ValueError, match=match):
            attention(*tensors, mask, grid, **more)

    refused(r"q \(18, 2, 16\)", q[0], k, v)
    refused(r"q \(1, 17, 2, 16\) has 17 rows", q[:, 1:], k, v)
    refused(r"k is \(1, 17, 2, 16\)", q, k[:, 1:], v)
    refused(r"v is \(1, 18, 1, 16\)", q, k, v[:, :, :1])
    refused(r"k \(1, 18, 0, 16\) has 0 heads", q, k[:, :, :0], v[:, :, :0])
    refused(r"v is \(1, 18, 2, 16\) torch.float16", q, k, v.half())
    refused("go together", q, k, v, text_k=case.text_k)
    refused(r"text_valid is \(1, 4\)", q, k, v, text_k=case.text_k, text_v=case.text_v,
            text_valid=case.text_valid[:, 1:])  # fmt: skip
    refused("text_valid is .* torch.int32", q, k, v, text_k=case.text_k, text_v=case.text_v,
            text_valid=case.text_valid.int())  # fmt: skip
    refused(r"text_q is \(1, 4, 2, 16\)", q, k, v, text_k=case.text_k, text_v=case.text_v, text_q=case.text_q[:, 1:])
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        refused("scale is .*, not positive and finite", q, k, v, scale=scale)
    refused("covers 2 frames", q, k, v, mask=MaskSpec(Order.sequential(2), Space()))


def test_triton_needs_adjacent_channels() -> None:
    case = make_case(WINDOW, GRID)
    spread = case.v.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match=r"v \(1, 18, 2, 16\) has strides .*adjacent"):
        attention(case.q, case.k, spread, WINDOW, GRID, implementation="triton")
