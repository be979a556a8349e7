"""The proof that a base in e4m3 trains as one in bf16 does."""

from __future__ import annotations

import pytest

from megacog.training.fp8_gap import Gap, main, run, trained_base


def test_differences_are_judged_by_the_spread_of_bf16() -> None:
    bf16 = [1.0, 1.1, 1.2]
    assert Gap(bf16, [1.0, 1.1, 1.2]).spread == pytest.approx(0.1)
    assert Gap(bf16, [1.19, 1.1, 1.01]).accepted
    assert not Gap(bf16, [1.0, 1.1, 1.41]).accepted
    assert not Gap([1.0, 1.0], [1.0, 1.001]).accepted


def test_a_few_steps_on_either_base_end_alike_but_not_equal() -> None:
    base = trained_base(steps=8)
    bf16, fp8 = (run(base, steps=8, seed=0, precision=precision) for precision in (None, "fp8"))
    assert bf16 != fp8 and fp8 == pytest.approx(bf16, abs=0.02)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_program_accepts_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--steps", "120", "--base-steps", "150", "--seeds", "3"]) == 0
    assert "within 2 x spread" in capsys.readouterr().out
