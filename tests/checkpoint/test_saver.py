"""Writing while training goes on, taking a run over, and dying at any moment; on one rank."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deaths import count_operations, die_after
from small_checkpoints import ELEMENTS, EVERYTHING, SIZES, header, newest, record, save, save_with, steps_in

from megacog.checkpoint import records
from megacog.checkpoint.discovery import find_checkpoint
from megacog.checkpoint.ownership import TakenOverError
from megacog.checkpoint.records import RecordReader, Snapshot
from megacog.checkpoint.retention import Retention
from megacog.checkpoint.saver import Saver, share_bytes
from megacog.errors import CheckpointError


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are written only when it is set."""
    event, save_tensors = threading.Event(), records.save_tensors

    def wait(*arguments: object) -> None:
        assert event.wait(30)
        save_tensors(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(records, "save_tensors", wait)
    yield event
    event.set()


def test_training_goes_on_while_the_copy_of_its_state_is_written(tmp_path: Path, gate: threading.Event) -> None:
    state = {name: torch.full((count,), 1.0) for name, count in ELEMENTS.items()}
    saver = Saver(tmp_path, EVERYTHING, asynchronous=True)
    saver.start(header(7), SIZES, lambda name: {"weight": state[name]})
    saver.wait_for_copy()
    for tensor in state.values():
        tensor.fill_(2.0)
    torch.manual_seed(99)
    assert saver.writing and find_checkpoint(tmp_path, "auto") is None
    gate.set()
    saved = saver.finish()
    assert saved is not None and not saver.writing and saver.finish() is None
    assert saved.step == 7 == newest(tmp_path)
    assert saved.bytes == sum(path.stat().st_size for path in saved.path.glob("*.safetensors"))
    found = find_checkpoint(tmp_path, "must")
    assert found is not None
    reader = RecordReader(saved.path, found[1].parameters)
    assert all(torch.equal(reader.read(name)["weight"], torch.full((count,), 1.0)) for name, count in ELEMENTS.items())
    assert not torch.equal(reader.read("rng/00000")["torch"], torch.get_rng_state())


def test_an_update_waits_for_the_copy_and_counts_as_standing_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Snapshot.copy

    def slow(self: Snapshot) -> None:
        time.sleep(0.3)
        copy(self)

    monkeypatch.setattr(Snapshot, "copy", slow)
    state = {name: torch.full((count,), 1.0) for name, count in ELEMENTS.items()}
    saver = Saver(tmp_path, EVERYTHING, asynchronous=True)
    saver.start(header(7), SIZES, lambda name: {"weight": state[name]})
    saver.wait_for_copy()
    for tensor in state.values():
        tensor.fill_(2.0)
    saved = saver.finish()
    assert saved is not None and saved.stall_seconds > 0.2
    found = find_checkpoint(tmp_path, "must")
    assert found is not None
    reader = RecordReader(saved.path, found[1].parameters)
    assert all(torch.equal(reader.read(name)["weight"], torch.full((count,), 1.0)) for name, count in ELEMENTS.items())


def test_a_copy_that_fails_lets_training_go_on_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Snapshot) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(Snapshot, "copy", fail)
    saver = Saver(tmp_path, EVERYTHING, asynchronous=True)
    saver.start(header(7), SIZES, record)
    saver.wait_for_copy()
    with pytest.raises(CheckpointError, match="step-0000007 could not be written: rank 0 .*no memory"):
        saver.finish()
    assert find_checkpoint(tmp_path, "auto") is None


def test_both_ways_write_the_same_files(tmp_path: Path) -> None:
    paths = [save_with(Saver(tmp_path / str(way), EVERYTHING, way), 1).path for way in (False, True)]
    names = sorted(path.name for path in paths[0].iterdir())
    assert len(names) == 3
    for name in names:
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes()


def test_the_largest_share_decides_over_the_host_memory() -> None:
    assert share_bytes({"a": 10, "b": 6, "c": 5}, 1) == 21
    assert share_bytes({"a": 10, "b": 6, "c": 5}, 2) == 11


def test_what_former_processes_left_unfinished_is_removed_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    old = [folder / ".step-0000002.tmp-0123456789ab", folder / ".step-0000001.trash-0123456789ab"]
    old.append(tmp_path / ".frozen.tmp-0123456789ab")
    kept = [folder / ".step-0000002.tmp-mine", folder / "step-0000002.tmp-0123456789ab", tmp_path / ".tmp-0123456789ab"]
    for path in (*old, *kept):
        path.mkdir()
        (path / "file").touch()
    saver = Saver(tmp_path, EVERYTHING, asynchronous=False)
    saver.close()
    assert not any(path.exists() for path in old) and all(path.exists() for path in kept)
    assert all(str(path) in caplog.text for path in old)
    save_with(saver, 2)
    assert newest(tmp_path) == 2


def test_a_process_whose_run_was_taken_over_publishes_nothing(tmp_path: Path) -> None:
    first = Saver(tmp_path, EVERYTHING, asynchronous=True)
    first.start(header(5), SIZES, record)
    second = Saver(tmp_path, EVERYTHING, asynchronous=True)
    with pytest.raises((TakenOverError, CheckpointError)):
        first.finish()
    with pytest.raises(TakenOverError, match=f"process {os.getpid()} on "):
        first.start(header(6), SIZES, record)
    assert find_checkpoint(tmp_path, "auto") is None
    save_with(second, 6)
    assert steps_in(tmp_path) == [6]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_death_after_any_write_sync_rename_or_removal_loses_no_complete_checkpoint(
    tmp_path: Path, asynchronous: bool
) -> None:
    def work(run: Path) -> None:
        save_with(Saver(run, Retention(last=1), asynchronous), 2)

    save(tmp_path / "before", 1)
    shutil.copytree(tmp_path / "before", tmp_path / "count")
    total = count_operations(lambda: work(tmp_path / "count"))
    assert total > 15
    found = []
    for last in range(1, total + 1):
        run = tmp_path / str(last)
        shutil.copytree(tmp_path / "before", run)
        die_after(last, lambda run=run: work(run))
        found.append(newest(run))
        save(run, 3)
        assert newest(run) == 3 and not list(run.rglob(".*tmp-*")) and not list(run.rglob(".*trash-*"))
    assert found == sorted(found) and set(found) == {1, 2}
