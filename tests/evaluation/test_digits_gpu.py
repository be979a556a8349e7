"""`launch/digits_gpu.sh` at toy size, and judging of enlarged frames."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from run_ranks import python_environment

from megacog.evaluation.judge import direction_of, enlarge, ink, ink_centers, shrink
from megacog.prepare import digits

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model.num_layers=1 model.hidden_size=32 model.num_heads=2 train.micro_batch_size=4 train.global_batch_size=4 "
    "train.precision=fp32 data.workers=0 generation.levels=0"
)


def clip() -> np.ndarray:
    scan = digits.scans("heldout")[0][0]
    return digits.render_clip(scan, "right", 4.0, (7.0, 15.0), 10)


def test_an_enlarged_clip_is_judged_as_the_clip_itself() -> None:
    frames = clip()
    large = enlarge(frames, 2)
    assert large.shape == (10, 64, 64, 3) and large.dtype == np.uint8
    again = shrink(large, 2)
    assert again.shape == frames.shape and again.dtype == np.uint8
    centers, expected = (ink_centers(ink(each)) for each in (again, frames))
    np.testing.assert_allclose(centers, expected, atol=0.15)
    assert direction_of(centers) == "right"
    assert enlarge(frames, 1) is frames and shrink(frames, 1) is frames


def test_a_pixel_is_the_mean_of_its_block() -> None:
    frames = np.zeros((1, 4, 4, 1), dtype=np.uint8)
    frames[0, :2, 2:, 0] = [[10, 20], [30, 41]]
    assert shrink(frames, 2)[0, :, :, 0].tolist() == [[0, 25], [0, 0]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_way_from_corpus_to_judged_clips(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    environment = python_environment() | {"DIGITS_CLIPS": "24", "DIGITS_STEPS": "2 2 2", "DIGITS_SETTINGS": TINY}
    for action in ("data", "train"):
        command = ["bash", str(ROOT / "launch/digits_gpu.sh"), action, str(folder)]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((folder / "evaluation/report.json").read_text())
    assert report["num_clips"] == 40 and 0 <= report["digit_accuracy"] <= 1
    assert report["real"]["digit_accuracy"] > 0.9
