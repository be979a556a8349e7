from __future__ import annotations

import errno
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megacog.metrics.record import FILE_NAME, Recorder, read_records


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]


def test_every_record_is_a_line_that_is_there_at_once(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run", 0, tensorboard=False)
    recorder.write(1, "train", loss=2.5, frames=[1.0, 2.0])
    assert lines(tmp_path / "run")[0]["loss"] == 2.5
    recorder.write(2, "eval", loss=torch.tensor(2.0), norm=np.float32(0.5), name="x", mfu=None)
    last = lines(tmp_path / "run")[1]
    assert (last["step"], last["kind"], last["loss"], last["norm"], last["mfu"]) == (2, "eval", 2.0, 0.5, None)
    recorder.close()


def test_numbers_that_json_lacks_become_text(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, tensorboard=False)
    recorder.write(1, "train", loss=float("nan"), norm=torch.tensor([float("inf"), 1.0]))
    assert lines(tmp_path)[0]["loss"] == "nan"
    assert lines(tmp_path)[0]["norm"] == ["inf", 1.0]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run", 1, tensorboard=True)
    recorder.write(1, "train", loss=1.0)
    recorder.truncate_after(0)
    recorder.close()
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_drops_later_records_and_goes_on(tmp_path: Path) -> None:
    first = Recorder(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3, 4):
        first.write(step, "train", loss=float(step))
    before = (tmp_path / FILE_NAME).read_text().splitlines()
    second = Recorder(tmp_path, 0, tensorboard=False)
    second.truncate_after(2)
    assert (tmp_path / FILE_NAME).read_text().splitlines() == before[:2]
    second.write(3, "train", loss=30.0)
    assert [record["loss"] for record in read_records(tmp_path / FILE_NAME)] == [1.0, 2.0, 30.0]
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_truncation_while_writing_keeps_the_same_recorder_usable(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, tensorboard=False)
    recorder.write(1, "train", loss=1.0)
    recorder.write(2, "train", loss=2.0)
    recorder.truncate_after(1)
    recorder.write(2, "train", loss=3.0)
    assert [record["loss"] for record in lines(tmp_path)] == [1.0, 3.0]


def test_half_a_line_of_a_killed_writer_spoils_nothing(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(b'{"step": 1, "kind": "train", "loss": 1.0}\n{"step": 2, "ki')
    recorder = Recorder(tmp_path, 0, tensorboard=False)
    recorder.write(2, "train", loss=2.0)
    assert [record["step"] for record in read_records(path)] == [1, 2]
    recorder.truncate_after(2)
    assert [record["step"] for record in lines(tmp_path)] == [1, 2]


def test_truncating_a_run_without_records_is_fine(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, tensorboard=False)
    recorder.truncate_after(10)
    recorder.write(11, "train", loss=1.0)
    assert len(lines(tmp_path)) == 1


def test_a_full_disk_is_one_warning_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path, 0, tensorboard=False)
    recorder.write(1, "train", loss=1.0)

    class FullDisk:
        """A raw file on a disk that takes half of the first line and nothing more."""

        def __init__(self, file: object) -> None:
            self.file = file

        def fileno(self) -> int:
            return int(self.file.fileno())  # type: ignore[attr-defined]

        def write(self, line: bytes) -> int:
            self.file.write(line[: len(line) // 2])  # type: ignore[attr-defined]
            raise OSError(errno.ENOSPC, "No space left on device")

    real = recorder._file
    recorder._file = FullDisk(real)
    with caplog.at_level(logging.WARNING):
        recorder.write(2, "train", loss=2.0)
        recorder.write(3, "train", loss=3.0)
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    recorder._file = real
    recorder.write(4, "train", loss=4.0)
    assert [record["step"] for record in lines(tmp_path)] == [1, 4]


def test_a_run_folder_that_cannot_be_made_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        Recorder(tmp_path / "file" / "run", 0, tensorboard=False).write(1, "train", loss=1.0)
    assert FILE_NAME in caplog.text


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_holds_the_same_numbers_also_after_a_resume(tmp_path: Path) -> None:
    first = Recorder(tmp_path, 0, tensorboard=True)
    for step in (1, 2, 3):
        first.write(step, "train", loss=float(step), frames=[1.0, 2.0], note="text", speed={"mfu": 0.5})
    first.close()
    second = Recorder(tmp_path, 0, tensorboard=True)
    second.truncate_after(2)
    second.write(3, "train", loss=30.0)
    second.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert found["train/frames_1"][0] == (1, 2.0)
    assert found["train/speed/mfu"][0] == (1, 0.5)
    assert "train/note" not in found


def test_a_missing_tensorboard_is_one_warning_that_tells_how_to_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    recorder = Recorder(tmp_path, 0, tensorboard=True)
    with caplog.at_level(logging.WARNING):
        recorder.write(1, "train", loss=1.0)
        recorder.write(2, "train", loss=1.0)
    assert len(caplog.records) == 1 and "metrics.tensorboard=false" in caplog.text
    assert len(lines(tmp_path)) == 2
