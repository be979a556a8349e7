"""Scores: what counts as right, by clip, by frame and by interval."""

from __future__ import annotations

import numpy as np
import pytest

from megacog.evaluation.judge import Judge, Verdict
from megacog.evaluation.scores import by_key, position_errors, score_clip, split_evenly, summarize


def path(num_frames: int, *steps: tuple[float, float]) -> np.ndarray:
    """Centers [T, 2] that follow each step for an equal share of the clip."""
    part = (num_frames - 1) // len(steps)
    moves = np.concatenate([np.tile(step, (part, 1)) for step in steps])
    return np.concatenate([[[16.0, 16.0]], 16.0 + moves.cumsum(axis=0)])


class Seeing:
    """Stands for the judge: sees what it is told to."""

    def __init__(self, digit: int, frame_digits: np.ndarray, centers: np.ndarray) -> None:
        self.verdict = Verdict(digit, None, frame_digits, centers)

    def __call__(self, frames: np.ndarray) -> Verdict:
        return self.verdict


def score(digit: int, directions: list[str], seen: Seeing):  # type: ignore[no-untyped-def]
    judge: Judge = seen  # type: ignore[assignment]
    return score_clip(judge, np.zeros((len(seen.verdict.centers_T2), 1, 1, 3)), digit, directions, key_step=8)


def test_a_straight_even_path_has_no_position_error() -> None:
    assert position_errors(path(33, (0.4, 0.0)), 8).tolist() == pytest.approx([0.0] * 28)


def test_position_errors_are_distances_of_interpolated_frames_only() -> None:
    centers = path(9, (1.0, 0.0))
    centers[3] += (3.0, 4.0)
    centers[8] = np.nan  # the second interval has no end
    errors = position_errors(centers, 4)
    assert errors.tolist() == pytest.approx([0, 0, 5.0])
    assert len(position_errors(path(11, (1.0, 0.0)), 4)) == 6  # frames 9 and 10 lie on no path


def test_a_clip_is_right_by_its_own_caption() -> None:
    frame_digits = np.array([3] * 30 + [8, 8, -1])
    seen = Seeing(3, frame_digits, path(33, (0.4, 0.0)))
    good = score(3, ["right"], seen)
    assert good.digit_right and good.direction_right
    assert good.digit_right_T.sum() == 30 and good.direction_right_I.tolist() == [True] * 4
    bad = score(8, ["left"], seen)
    assert not bad.digit_right and not bad.direction_right and bad.digit_right_T.sum() == 2
    assert not bad.direction_right_I.any()


def test_a_two_part_clip_must_do_both_parts_in_order() -> None:
    seen = Seeing(1, np.ones(33, dtype=int), path(33, (0.4, 0.0), (0.0, 0.4)))
    assert score(1, ["right", "down"], seen).direction_right
    assert not score(1, ["down", "right"], seen).direction_right
    assert not score(1, ["right"], seen).direction_right_I.all()


def test_parts_share_their_border_frames() -> None:
    parts = split_evenly(np.arange(9.0)[:, None], 2)
    assert [part[:, 0].tolist() for part in parts] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


def test_the_summary_is_the_mean_over_clips() -> None:
    right = Seeing(3, np.full(33, 3), path(33, (0.4, 0.0)))
    captions = [(3, "right"), (4, "up"), (3, "left"), (3, "right")]
    scores = [score(digit, [way], right) for digit, way in captions]
    summary = summarize(scores)
    assert summary["digit_accuracy"] == 0.75 and summary["direction_accuracy"] == 0.5
    assert summary["digit_accuracy_by_frame"] == [0.75] * 33
    assert summary["direction_accuracy_by_key_interval"] == [0.5] * 4
    assert summary["position_error_px"] == 0.0
    keys = by_key(scores)
    assert keys["digit_accuracy_by_digit"] == {"3": 1.0, "4": 0.0}
    assert keys["direction_accuracy_by_direction"] == {"left": 0.0, "right": 1.0, "up": 0.0}
