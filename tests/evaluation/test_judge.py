"""The judge: right about real clips it has never seen, honest about clips with nothing in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megacog.evaluation import judge as judge_module
from megacog.evaluation.judge import (
    CROP,
    Judge,
    JudgeSettings,
    crops_around,
    direction_of,
    ink,
    ink_centers,
    load_or_train_judge,
)
from megacog.prepare import digits

# A fifth of the real training: enough to be far above chance.
SMALL = JudgeSettings(steps=70, batch_size=64, clips_per_scan=1, frames_per_clip=2)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return judge_module.train_judge(SMALL)


def spot(x: float, y: float, num_frames: int = 1) -> np.ndarray:
    """A square of 4 x 4 white pixels centered at (x, y)."""
    frames = np.zeros((num_frames, 32, 32, 3), dtype=np.uint8)
    frames[:, int(y) - 2 : int(y) + 2, int(x) - 2 : int(x) + 2] = 255
    return frames


def test_held_out_digits_and_directions_are_read(judge: Judge) -> None:
    right_digits, right_ways = [], []
    for clip in digits.corpus_clips("heldout", 80, seed=9):
        verdict = judge(digits.render(clip))
        right_digits.append(verdict.digit == clip.digit)
        right_ways.append(verdict.direction == clip.motion.directions[0])
        assert verdict.frame_digits_T.shape == (clip.motion.num_frames,)
    # Chance is 0.10; the full training reaches 0.98.
    assert np.mean(right_digits) >= 0.8
    assert np.mean(right_ways) == 1.0


def test_the_judge_learns_from_its_own_scans_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    scans = digits.scans
    monkeypatch.setattr(digits, "scans", lambda split: asked.append(split) or scans(split))
    judge_module._training_crops(JudgeSettings(clips_per_scan=1, frames_per_clip=1))
    assert asked == ["judge"]
    splits = [set(digits.scan_ids(split)) for split in ("train", "heldout", "judge")]
    assert not (splits[2] & (splits[0] | splits[1]))


def test_an_empty_clip_has_no_digit_and_no_direction(judge: Judge) -> None:
    verdict = judge(np.zeros((5, 32, 32, 3), dtype=np.uint8))
    assert verdict.digit == -1 and verdict.direction is None
    assert (verdict.frame_digits_T == -1).all() and np.isnan(verdict.centers_T2).all()


def test_centers_are_in_pixels_with_y_downwards() -> None:
    frames = np.concatenate([spot(6, 10), spot(20, 25), np.zeros((1, 32, 32, 3), dtype=np.uint8)])
    centers = ink_centers(ink(frames))
    np.testing.assert_allclose(centers[:2], [[6, 10], [20, 25]])
    assert np.isnan(centers[2]).all()


@pytest.mark.parametrize(("way", "step"), [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))])
def test_directions_follow_the_line_and_ignore_gaps_and_jitter(way: str, step: tuple[int, int]) -> None:
    centers = np.array([16.0, 16.0]) + 0.4 * np.arange(33)[:, None] * np.array(step)
    centers += np.random.default_rng(0).normal(0, 0.5, centers.shape)
    centers[5:9] = np.nan
    assert direction_of(centers) == way


def test_standing_still_is_no_direction() -> None:
    assert direction_of(np.full((33, 2), 16.0)) is None
    assert direction_of(np.array([[1.0, 1.0], [np.nan, np.nan]])) is None


def test_crops_follow_the_digit_to_the_edge() -> None:
    frames = ink(spot(3, 29))
    crop = crops_around(frames, ink_centers(frames))[0, 0]
    assert crop.shape == (CROP, CROP)
    assert torch.equal(crop[8:12, 8:12], torch.ones(4, 4))
    assert crop.sum() == 16


def test_a_trained_judge_is_kept_and_a_damaged_one_is_trained_again(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    monkeypatch.setattr(judge_module, "train_judge", lambda settings: trained.append(settings) or judge)
    clip = digits.render(next(digits.corpus_clips("heldout", 1, seed=1)))
    load_or_train_judge(tmp_path, SMALL)
    kept = load_or_train_judge(tmp_path, SMALL)
    assert trained == [SMALL]
    np.testing.assert_array_equal(kept(clip).frame_digits_T, judge(clip).frame_digits_T)
    next(tmp_path.iterdir()).write_bytes(b"damaged")
    load_or_train_judge(tmp_path, SMALL)
    load_or_train_judge(tmp_path, JudgeSettings(steps=1))
    assert trained == [SMALL, SMALL, JudgeSettings(steps=1)]


def test_a_judge_serves_on_machines_with_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    here = judge_module._fingerprint(SMALL)
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert judge_module._fingerprint(SMALL) == here != judge_module._fingerprint(JudgeSettings(steps=1))
