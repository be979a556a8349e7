"""The evaluate command and the proofs, end to end with a random export of the demo's size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from small_export import make_export

from megacog.errors import DataError
from megacog.evaluation import evaluate as evaluate_module
from megacog.evaluation import rates, replay
from megacog.evaluation.evaluate import main, real_clips, tasks
from megacog.evaluation.judge import Judge, JudgeSettings, direction_of, ink, ink_centers, train_judge
from megacog.generation.output import can_write_mp4
from megacog.prepare import digits


@pytest.fixture(scope="module")
def judge() -> Judge:
    return train_judge(JudgeSettings(steps=20, batch_size=32, clips_per_scan=1, frames_per_clip=1))


@pytest.fixture(scope="module")
def export_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("evaluate"), grid=(8, 8), levels=1)


@pytest.fixture(scope="module")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("small"))


def test_every_caption_comes_once_per_seed() -> None:
    wanted = tasks(85, seed=10)
    assert [task.caption for task in wanted[:40]] == digits.captions()
    assert [task.seed for task in wanted] == [10] * 40 + [11] * 40 + [12] * 5
    two_part = tasks(120, 0, two_part=True)
    assert len({task.caption for task in two_part}) == 120
    assert two_part[0].caption == "the digit 0 moves left then right"


def test_real_clips_are_held_out_digits_that_move_as_captioned() -> None:
    for task, frames in real_clips(8, 33, 8.0, two_part=False):
        assert frames.shape == (33, 32, 32, 3)
        assert direction_of(ink_centers(ink(frames))) == task.directions[0]


def test_the_command_writes_clips_a_picture_and_an_honest_report(
    export_path: Path, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate_module, "load_or_train_judge", lambda cache: judge)
    arguments = [str(export_path), "--clips", "5", "--real-clips", "4", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [clip["caption"] for clip in report["clips"]] == digits.captions()[:5]
    assert {clip["seed"] for clip in report["clips"]} == {1234}
    for clip in report["clips"]:
        with av.open(clip["path"]) as container:
            assert len(list(container.decode(video=0))) == 9
    assert len(report["digit_accuracy_by_frame"]) == 9 and len(report["direction_accuracy_by_key_interval"]) == 4
    # Random weights: the verdicts in the rows and the accuracies must tell the same story.
    named = [int(clip["caption"].split()[2]) == clip["judged_digit"] for clip in report["clips"]]
    assert report["digit_accuracy"] == pytest.approx(np.mean(named), abs=1e-3)
    moved = [clip["caption"].split(" moves ")[1:] == clip["judged_directions"] for clip in report["clips"]]
    assert report["direction_accuracy"] == pytest.approx(np.mean(moved), abs=1e-3)
    # Real clips move straight; a random tokenizer keeps little of them.
    assert report["real"]["direction_accuracy"] == 1.0 and report["real"]["position_error_px"] < 0.1
    assert report["reconstruction"]["psnr_db"] < 20
    assert report["settings"]["batch_size"] == 128
    assert set(report["seconds"]) == {"judge", "real_and_reconstruction", "generation", "total"}
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.height > 5 * 64
    assert "real held-out (4)" in capsys.readouterr().out
    # A second evaluation replaces the first; where no video library is, it has no mp4.
    monkeypatch.setitem(sys.modules, "av", None)
    can_write_mp4.cache_clear()
    assert main([*arguments[:1], "--clips", "1", "--real-clips", "1", *arguments[5:], "levels=0"]) == 0
    can_write_mp4.cache_clear()
    (clip,) = json.loads((tmp_path / "out" / "report.json").read_text())["clips"]
    assert clip["path"] is None and "no mp4 files will be written" in capsys.readouterr().err


def test_a_model_of_another_size_is_refused(small_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="frames of 16x16 pixels; the judge knows"):
        main([str(small_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("speed", [3.0, -2.0])
def test_the_shift_per_frame_is_measured_along_the_caption(speed: float) -> None:
    scan = digits.scans("heldout")[0][0]
    direction = "right" if speed > 0 else "left"
    for fps in (1.0, 2.0, 4.0):
        clip = digits.render_clip(scan, direction, abs(speed), (16.0 - 2 * speed, 16.0), 5, fps)
        expected = speed / fps
        assert rates.shift_per_frame(clip, "right") == pytest.approx(expected, abs=0.05)
    assert np.isnan(rates.shift_per_frame(np.zeros((5, 32, 32, 3), dtype=np.uint8), "up"))


def test_the_rate_proof_makes_all_captions_at_three_rates(
    export_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rates, "tasks", lambda count, seed: tasks(2, seed))
    assert rates.main([str(export_path), "--json", str(tmp_path / "rates.json")]) == 1, "random weights obey no rate"
    shown = capsys.readouterr().out
    assert "the digit 0 moves right" in shown and "ratio" in shown
    table = json.loads((tmp_path / "rates.json").read_text())
    assert table["fps"] == [1.0, 2.0, 4.0] and len(table["captions"]) == 2


def test_the_replay_proof_holds_for_every_stage(small_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(small_path), "--clips", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:7]] == ["base"] * 2 + ["sequential"] * 2 + ["interpolation"] * 2
    # base: 2 clips x 16 cells; sequential: all five frames are stepped through; interpolation: frames 1 and 3.
    assert [int(line.split()[2]) for line in lines[1:7]] == [32, 32, 160, 160, 64, 64]


def test_the_replay_proof_notices_a_difference(small_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = replay.replayed_logits
    monkeypatch.setattr(replay, "replayed_logits", lambda *arguments: cached(*arguments) * 1.001)
    assert replay.main([str(small_path), "--clips", "1"]) == 1


@pytest.mark.parametrize(("shifts", "code"), [([4.0, 2.0, 1.0], 0), ([4.0, 3.0, 2.2], 1), ([4.0, 2.0, np.nan], 1)])
def test_the_rate_proof_fails_unless_shifts_halve(
    export_path: Path, monkeypatch: pytest.MonkeyPatch, shifts: list[float], code: int
) -> None:
    monkeypatch.setattr(rates, "measure", lambda generator, wanted: np.tile(shifts, (len(wanted), 1)))
    assert rates.main([str(export_path)]) == code
