"""Steps that are not finite."""

from __future__ import annotations

import math

import pytest

from megacog.training.guard import Guard, NonFiniteError


def test_finite_steps_pass_and_reset_the_count() -> None:
    guard = Guard(limit=2)
    guard.check(1, math.nan, math.nan, False, ["a"])
    guard.check(2, 1.0, 0.5, True, ["b"])
    guard.check(3, 1.0, math.inf, False, ["c"])
    assert guard.consecutive == 1 and guard.skipped == 2


def test_too_many_skips_in_a_row_end_the_run_and_name_step_and_samples() -> None:
    guard = Guard(limit=3)
    for step in (7, 8):
        guard.check(step, math.nan, math.inf, False, ["x"])
    with pytest.raises(NonFiniteError, match=r"step 9: .*clip-4\[0:5:1\]"):
        guard.check(9, math.nan, math.inf, False, ["clip-4[0:5:1]"])


def test_an_applied_step_without_a_finite_loss_ends_the_run_at_once() -> None:
    with pytest.raises(NonFiniteError, match="spoiled"):
        Guard().check(1, math.nan, 1.0, True, ["x"])
