"""What the judge's verdicts on many clips add up to.

Tensor suffixes: T frames, H/W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megacog.evaluation.judge import Judge, direction_of


@dataclass(frozen=True)
class ClipScore:
    """One judged clip."""

    digit: int
    """The captioned digit."""
    directions: tuple[str, ...]
    """The captioned direction, or the two of a two-part clip."""
    judged_digit: int
    judged_directions: tuple[str | None, ...]
    digit_right_T: np.ndarray
    """bool: every frame on its own."""
    direction_right_I: np.ndarray
    """bool: every interval between key frames on its own."""
    position_errors: np.ndarray
    """Pixels, of every interpolated frame whose key frames have ink."""

    @property
    def digit_right(self) -> bool:
        return self.judged_digit == self.digit

    @property
    def direction_right(self) -> bool:
        return self.judged_directions == self.directions


def position_errors(centers_T2: np.ndarray, key_step: int) -> np.ndarray:
    """Distance in pixels of each interpolated frame's center from the straight path between its key frames.

    Args:
        centers_T2: center (x, y) of the digit in every frame, NaN where there is none.
        key_step: frames from one key frame to the next.

    Returns:
        One number per frame that is no key frame, NaN left out; frames after the last key frame have no path.
    """
    last_key = (len(centers_T2) - 1) // key_step * key_step
    frames = np.array([frame for frame in range(last_key) if frame % key_step], dtype=int)
    before = frames // key_step * key_step
    share_T1 = ((frames - before) / key_step)[:, None]
    path_T2 = centers_T2[before] * (1 - share_T1) + centers_T2[before + key_step] * share_T1
    errors_T = np.linalg.norm(centers_T2[frames] - path_T2, axis=1)
    return errors_T[~np.isnan(errors_T)]


def split_evenly(centers_T2: np.ndarray, parts: int) -> list[np.ndarray]:
    """The clip's centers in parts of equal duration that share their border frames."""
    borders = np.linspace(0, len(centers_T2) - 1, parts + 1).round().astype(int)
    return [centers_T2[start : stop + 1] for start, stop in zip(borders[:-1], borders[1:], strict=True)]


def score_clip(
    judge: Judge, frames_THWC: np.ndarray, digit: int, directions: Sequence[str], key_step: int
) -> ClipScore:
    """The judge's verdict on a clip held against its caption."""
    verdict = judge(frames_THWC)
    judged = tuple(direction_of(part) for part in split_evenly(verdict.centers_T2, len(directions)))
    intervals = max(1, (len(frames_THWC) - 1) // key_step)
    of_interval = [directions[index * len(directions) // intervals] for index in range(intervals)]
    by_interval = [direction_of(part) for part in split_evenly(verdict.centers_T2, intervals)]
    return ClipScore(
        digit,
        tuple(directions),
        verdict.digit,
        judged,
        verdict.frame_digits_T == digit,
        np.array([seen == wanted for seen, wanted in zip(by_interval, of_interval, strict=True)]),
        position_errors(verdict.centers_T2, key_step),
    )


def summarize(scores: Sequence[ClipScore]) -> dict[str, Any]:
    """Means over clips of equal length, ready for JSON; accuracies in 0..1, positions in pixels."""
    errors = np.concatenate([score.position_errors for score in scores])
    return {
        "num_clips": len(scores),
        "digit_accuracy": _mean(score.digit_right for score in scores),
        "direction_accuracy": _mean(score.direction_right for score in scores),
        "digit_accuracy_by_frame": np.mean([score.digit_right_T for score in scores], axis=0).round(4).tolist(),
        "direction_accuracy_by_key_interval": np.mean([score.direction_right_I for score in scores], axis=0)
        .round(4)
        .tolist(),
        "position_error_px": round(float(errors.mean()), 4) if len(errors) else None,
        "position_error_px_p95": round(float(np.quantile(errors, 0.95)), 4) if len(errors) else None,
    }


def by_key(scores: Sequence[ClipScore]) -> dict[str, dict[str, float]]:
    """Digit accuracy of every captioned digit and direction accuracy of every captioned way."""
    numbers = sorted({score.digit for score in scores})
    ways = sorted({score.directions for score in scores})
    return {
        "digit_accuracy_by_digit": {
            str(digit): _mean(score.digit_right for score in scores if score.digit == digit) for digit in numbers
        },
        "direction_accuracy_by_direction": {
            " then ".join(way): _mean(score.direction_right for score in scores if score.directions == way)
            for way in ways
        },
    }


def _mean(values: Iterable[bool]) -> float:
    return round(float(np.mean([*values])), 4)
