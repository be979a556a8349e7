"""Which checkpoints stay."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from small_checkpoints import EVERYTHING, newest, save, save_with, steps_in

from megacog.checkpoint.discovery import checkpoint_path
from megacog.checkpoint.manifest import FILE_NAME
from megacog.checkpoint.retention import Retention, retire_old
from megacog.checkpoint.saver import Saver


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Retention(last=2), asynchronous=True)
    for step in (1, 2, 3, 4):
        save_with(saver, step)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-0000003", "step-0000004"]


def test_permanent_ones_and_the_best_stay_besides_the_last(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Retention(last=1, every=4, best=2), asynchronous=False)
    for step, loss in enumerate([5.0, 1.0, None, 3.0, 2.0, 4.0, 1.5, 6.0, 7.0], start=1):
        save_with(saver, step, loss)
    assert steps_in(tmp_path) == [2, 4, 7, 8, 9]
    assert (tmp_path / "checkpoints/best").read_text() == "step-0000002\n"


def test_the_best_of_a_former_process_is_still_known(tmp_path: Path) -> None:
    for step, loss in ((1, 1.0), (2, 3.0), (3, 2.0)):
        save(tmp_path, step, Retention(last=1, best=1), loss)  # each in a process of its own, as it were
    assert steps_in(tmp_path) == [1, 3]


def test_damaged_checkpoints_do_not_count_and_go_when_enough_newer_ones_are_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        (checkpoint_path(tmp_path, step) / FILE_NAME).unlink()
    retire_old(tmp_path, Retention(last=2))
    assert steps_in(tmp_path) == [1, 2, 3] and newest(tmp_path) == 1
    save(tmp_path, 4, Retention(last=2))
    assert steps_in(tmp_path) == [1, 2, 3, 4], "two whole ones must stay"
    save(tmp_path, 5, Retention(last=2))
    assert steps_in(tmp_path) == [4, 5]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(tmp_path, step, EVERYTHING)

    def refuse(path: Path, _: Path) -> None:
        raise OSError(errno.EACCES, "refused", str(path))

    assert retire_old(tmp_path, Retention(last=1), refuse) == []
    assert "step-0000001" in caplog.text and steps_in(tmp_path) == [1, 2]
