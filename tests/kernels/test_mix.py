"""The mix of two channels against fp64: compiled on GPUs, interpreted elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from attention_cases import DEVICE, TOLERANCE, error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from uninitialized import filled_with_nan

from megacog_kernels.launch import Call
from megacog_kernels.mix import mix
from megacog_kernels.mix.calls import SUM_STEPS, TILE

NAMES = ("base", "plus", "logit")


@pytest.fixture(autouse=True, scope="module")
def _unwritten_elements_show() -> Iterator[None]:
    with filled_with_nan():
        yield


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """base, plus and logit."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(DEVICE, dtype) for size in (shape, shape, shape[-1:])]


def written_out(base: Tensor, plus: Tensor, logit: Tensor) -> Tensor:
    share = 1 / (1 + (-logit).exp())
    return share * base + (1 - share) * plus


def kernels(base: Tensor, plus: Tensor, logit: Tensor) -> Tensor:
    return mix(base, plus, logit, implementation="triton")


def results(given: list[Tensor], needed: tuple[bool, ...], run: Callable[..., Tensor]) -> list[Tensor]:
    """The mix, then the gradients that are needed, for a fixed gradient of the mix."""
    leaves = [part.detach().requires_grad_(wanted) for part, wanted in zip(given, needed, strict=True)]
    out = run(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out, asked, grad) if asked else ())]


def check(shape: tuple[int, ...], dtype: torch.dtype, needed: tuple[bool, ...], seed: int = 0) -> None:
    given = tensors(shape, dtype, seed)
    wanted = results([part.double() for part in given], needed, written_out)
    for mine, theirs in zip(results(given, needed, kernels), wanted, strict=True):
        assert mine.dtype == dtype and mine.shape == theirs.shape
        assert error(mine, theirs) < TOLERANCE[dtype]


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate], print_blob=True)
@given(
    st.integers(0, 20), st.one_of(st.integers(1, 70), st.sampled_from([1025, 3072])),
    st.tuples(st.booleans(), st.booleans(), st.booleans()), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_and_any_gradients(rows: int, width: int, needed: tuple[bool, ...], seed: int) -> None:
    check((rows, width), torch.float32, needed, seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    check((2, 3, 192), dtype, (True, True, True))


def test_the_gradient_of_the_logit_over_several_partial_sums() -> None:
    check((2, SUM_STEPS * TILE, 24), torch.float32, (True, True, True))
    check((SUM_STEPS * TILE + 1, 24), torch.float32, (False, False, True))


def test_gradients_are_bitwise_the_same_in_every_run() -> None:
    given = tensors((SUM_STEPS * TILE + 3, 40))
    assert all(map(torch.equal, *(results(given, (True, True, True), kernels) for _ in range(2))))


def test_rows_that_are_not_adjacent() -> None:
    base, plus, logit = tensors((2, 3, 24))
    spread = base.mT.contiguous().mT
    assert not spread.is_contiguous()
    assert torch.equal(kernels(spread, plus, logit), kernels(base, plus, logit))


def test_only_what_is_needed_is_computed_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Call] = []
    run = Call.run
    monkeypatch.setattr(Call, "run", lambda call: (launched.append(call), run(call))[1])
    given, saved = tensors((3, 16)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: (saved.append(part), part)[1], lambda part: part):
        results(given, (True, True, False), kernels)
    assert [call.kernel.fn.__name__ for call in launched] == ["mix_forward", "mix_backward"]
    assert not launched[1].constants["LOGIT"]
    assert sum(part.numel() for part in saved) == 16, "without the logit's gradient only the logit is kept"
    launched.clear()
    results(given, (False, True, True), kernels)
    constants = launched[1].constants
    assert (constants["BASE"], constants["PLUS"], constants["LOGIT"]) == (False, True, True)


def test_the_reference_is_bitwise_the_formula() -> None:
    base, plus, logit = tensors((4, 24), torch.bfloat16)
    share = logit.sigmoid()
    assert torch.equal(mix(base, plus, logit, implementation="reference"), share * base + (1 - share) * plus)


def test_the_operator_keeps_the_rules_of_operators() -> None:
    given = [part.requires_grad_() for part in tensors((2, 3, 8))]
    torch.library.opcheck(torch.ops.megacog.mix.default, tuple(given))


def test_it_compiles_with_the_model_around_it() -> None:
    given = tensors((2, 3, 16))

    def model(base: Tensor, plus: Tensor, logit: Tensor) -> Tensor:
        return kernels(base * 2, plus, logit).sin()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, *(results(given, (True, True, True), run) for run in (model, compiled))))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_arguments_that_do_not_fit_are_named_with_their_shape(implementation: str) -> None:
    base, plus, logit = tensors((2, 16))

    def refused(match: str, *given: Tensor) -> None:
        with pytest.raises(ValueError, match=match):
            mix(*given, implementation=implementation)

    refused(r"plus has shape \(1, 16\), \(2, 16\) fits base \(2, 16\)", base, plus[:1], logit)
    refused(r"logit has shape \(15,\), \(16,\) fits base", base, plus, logit[:15])
    refused(r"logit \(16,\) is torch.float16 on cpu, base \(2, 16\) is torch.float32", base, plus, logit.half())
    refused(r"base \(2, 0\) has no channels", base[:, :0], plus, logit)
