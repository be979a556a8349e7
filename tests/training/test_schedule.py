"""The learning rate: warm-up, cosine, floor."""

from __future__ import annotations

import pytest

from megacog.config.schema import TrainConfig
from megacog.training.schedule import learning_rate


def train(**values: object) -> TrainConfig:
    fixed = {"stage": "base", "run_dir": "run", "steps": 1100, "global_batch_size": 1, "micro_batch_size": 1}
    return TrainConfig.model_validate(fixed | {"learning_rate": 2e-4, "warmup_steps": 100} | values)


def test_warm_up_rises_linearly_from_the_first_step() -> None:
    assert learning_rate(1, train()) == pytest.approx(2e-6)
    assert learning_rate(50, train()) == pytest.approx(1e-4)
    assert learning_rate(100, train()) == pytest.approx(2e-4)


def test_cosine_is_halfway_in_the_middle_and_at_the_floor_at_the_end() -> None:
    assert learning_rate(600, train()) == pytest.approx(2e-4 * 0.55)
    assert learning_rate(1100, train()) == pytest.approx(2e-5)
    assert learning_rate(5000, train()) == pytest.approx(2e-5)


def test_schedule_has_the_shape_of_the_release() -> None:
    # lr * 0.1 * ((cos(pi * n) + 1) * 4.5 + 1), n the share of the decay
    assert learning_rate(350, train()) == pytest.approx(2e-4 * 0.1 * ((2**-0.5 + 1) * 4.5 + 1))


def test_no_warm_up_starts_near_the_top() -> None:
    assert learning_rate(1, train(warmup_steps=0)) == pytest.approx(2e-4, rel=1e-4)


def test_warm_up_as_long_as_the_run_never_divides_by_zero() -> None:
    assert learning_rate(1101, train(warmup_steps=1100)) == pytest.approx(2e-5)


def test_step_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        learning_rate(0, train())
