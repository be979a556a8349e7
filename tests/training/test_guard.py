"""Steps that are not finite, and losses that spike."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megacog.config.schema import WatchConfig
from megacog.training.guard import FOLDER, Guard, MicroBatch, NonFiniteError
from megacog.training.spikes import Spikes


def guard(tmp_path: Path, **config: Any) -> Guard:
    return Guard(WatchConfig(**config), tmp_path, rank=3)


def batch(*ids: str, loss: float = 1.0) -> MicroBatch:
    return MicroBatch(ids, torch.tensor([loss, 2.0]))


def test_finite_steps_pass_and_reset_the_count(tmp_path: Path) -> None:
    watched = guard(tmp_path, max_skipped_steps=2)
    watched.check(1, math.nan, math.nan, False, [batch("a", loss=math.nan)])
    watched.check(2, 1.0, 0.5, True, [batch("b")])
    watched.check(3, 1.0, math.inf, False, [batch("c")])
    assert watched.consecutive == 1 and watched.skipped == 2


def test_too_many_skips_in_a_row_end_the_run_and_name_step_and_samples(tmp_path: Path) -> None:
    watched = guard(tmp_path, max_skipped_steps=3)
    for step in (7, 8):
        watched.check(step, math.nan, math.inf, False, [batch("x", loss=math.nan)])
    with pytest.raises(NonFiniteError, match=r"step 9: .*clip-4\[0:5:1\]"):
        watched.check(9, math.nan, math.inf, False, [batch("clip-4[0:5:1]", loss=math.nan)])


def test_an_applied_step_without_a_finite_loss_ends_the_run_at_once(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="spoiled"):
        guard(tmp_path).check(1, math.nan, 1.0, True, [batch("x")])


def test_the_samples_of_the_bad_micro_batch_are_dumped_with_their_losses(tmp_path: Path) -> None:
    guard(tmp_path).check(5, math.nan, math.nan, False, [batch("good"), batch("bad", "worse", loss=math.inf)])
    (path,) = (tmp_path / FOLDER).iterdir()
    assert path.name == "step-0000005-rank-3.json"
    found = json.loads(path.read_text())
    assert (found["step"], found["rank"]) == (5, 3) and "gradient norm nan" in found["why"]
    assert found["micro_batches"] == [{"sample_ids": ["bad", "worse"], "loss": "inf", "frame_loss": [2.0]}]


def test_a_rank_whose_losses_are_finite_dumps_nothing_unless_only_the_gradients_are_not(tmp_path: Path) -> None:
    watched = guard(tmp_path)
    watched.check(5, math.nan, math.nan, False, [batch("good")])
    assert not (tmp_path / FOLDER).exists()
    watched.check(6, 1.0, math.inf, False, [batch("suspect")])
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["step-0000006-rank-3.json"]


def test_a_dump_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).write_text("a file where a folder is needed")
    with caplog.at_level(logging.WARNING):
        guard(tmp_path).check(5, 1.0, math.inf, False, [batch("suspect")])
    assert "could not be written" in caplog.text and "suspect" in caplog.text


def test_a_loss_six_deviations_above_the_mean_is_a_spike() -> None:
    spikes = Spikes(window=8, sigma=6.0)
    noise = [1.0, 1.2] * 4  # mean 1.1, deviation 0.1
    assert [spikes.score(loss) for loss in noise] == [None] * 8
    assert spikes.score(1.69) is None
    again = Spikes(window=8, sigma=6.0)
    again.restore(noise)
    assert again.score(1.71) == pytest.approx(6.1)


def test_nothing_is_a_spike_before_the_window_is_full_nor_in_constant_losses_nor_without_sigma() -> None:
    spikes = Spikes(window=8, sigma=6.0)
    assert [spikes.score(loss) for loss in [1.0, 1.1, 50.0]] == [None] * 3
    constant = Spikes(window=8, sigma=6.0)
    assert [constant.score(1.0) for _ in range(8)] + [constant.score(1.001)] == [None] * 9
    off = Spikes(window=8, sigma=0.0)
    assert [off.score(loss) for loss in [1.0, 1.1] * 4 + [50.0]] == [None] * 9


def test_the_guard_goes_on_where_a_checkpoint_has_left_it(tmp_path: Path) -> None:
    first = guard(tmp_path, spike_window=8)
    first.check(1, math.nan, math.nan, False, [batch("x")])
    for step in range(2, 10):
        assert first.check(step, 1.0 + 0.1 * (step % 2), 1.0, True, [batch("x")]) is None
    second = guard(tmp_path, spike_window=8)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.skipped == 1
    score = second.check(10, 9.0, 1.0, True, [batch("y")])
    assert score is not None and score > 6 and second.state()["spiked"] == 1
    assert (tmp_path / FOLDER / "step-0000010-rank-3.json").exists()
