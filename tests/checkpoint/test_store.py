"""Writing and finding checkpoints, on one rank."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_checkpoints import EVERYTHING, SIZES, flip_byte, header, newest, record, save

from megacog.checkpoint import commit
from megacog.checkpoint.commit import verify_folder
from megacog.checkpoint.discovery import checkpoint_path, find_checkpoint
from megacog.checkpoint.manifest import FILE_NAME
from megacog.checkpoint.records import RecordReader
from megacog.checkpoint.saver import Saver
from megacog.checkpoint.store import needed_bytes, open_frozen, save_frozen
from megacog.errors import CheckpointError, EnvError


def test_the_newest_checkpoint_is_found_and_holds_what_was_saved(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = save(tmp_path, 10)
    found = find_checkpoint(tmp_path, "must")
    assert found is not None and found[0] == path == checkpoint_path(tmp_path, 10)
    reader = RecordReader(path, found[1].parameters)
    assert torch.equal(reader.read("a.weight")["weight"], record("a.weight")["weight"])
    assert "torch" in reader.read("rng/00000")
    assert (tmp_path / "checkpoints/latest").read_text() == "step-0000010\n"


def cut(share: float) -> Callable[[Path], None]:
    """Leaves a share of a file's bytes."""

    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return damage


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": cut(0.0), "half": cut(0.5), "last byte missing": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "longer": lengthen, "flipped": lambda path: flip_byte(path, -9), "deleted": Path.unlink,
    "a folder": replace_by_folder,
}  # fmt: skip
FILES = ["records-00000-00.safetensors", "rng-00000-00.safetensors", FILE_NAME]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, damage: str, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    if (damage, file) == ("longer", FILE_NAME):
        pytest.skip("white space after JSON is padding")
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    DAMAGES[damage](path / file)
    assert newest(tmp_path) == 1
    told = f"checkpoint {path} cannot be used: .*{path / file} .*; trying the one before"
    assert re.search(told, caplog.text) is not None


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_byte_is_noticed_and_its_file_named(tmp_path: Path, file: str) -> None:
    path = save(tmp_path, 1)
    content = (path / file).read_bytes()
    places = [*range(min(len(content), 1500)), *range(1500, len(content), 97)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (path / file).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=file):
            verify_folder(path)
    (path / file).write_bytes(content)
    assert verify_folder(path).step == 1


def test_when_all_are_damaged_nothing_starts_silently_from_zero(tmp_path: Path) -> None:
    (save(tmp_path, 1) / FILE_NAME).unlink()
    with pytest.raises(CheckpointError, match="step-0000001"):
        find_checkpoint(tmp_path, "auto")


def test_resume_must_never_and_auto(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "auto") is None and find_checkpoint(tmp_path, "never") is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path, "must")
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="never"):
        find_checkpoint(tmp_path, "never")


@pytest.mark.parametrize("hint", [None, "", "garbage\r\n", "step-0009999\n"])
def test_the_hint_decides_nothing(tmp_path: Path, hint: str | None) -> None:
    save(tmp_path, 3)
    path = tmp_path / "checkpoints/latest"
    path.unlink() if hint is None else path.write_text(hint)
    assert newest(tmp_path) == 3


def test_leftovers_of_a_killed_writer_are_ignored_and_the_step_can_be_saved_again(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints/.step-0000004.tmp-abc"
    leftover.mkdir(parents=True)
    (leftover / "records-00000-00.safetensors").write_bytes(b"half")
    assert find_checkpoint(tmp_path, "auto") is None
    save(tmp_path, 4)
    save(tmp_path, 4)
    assert newest(tmp_path) == 4


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_leaves_the_older_checkpoints_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    save(tmp_path, 1)

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megacog.checkpoint.records.save_tensors", no_space)
    saver = Saver(tmp_path, EVERYTHING, asynchronous)
    saver.start(header(2), SIZES, record)
    told = r"step-0000002.*rank 0 on .*step-0000002.tmp.*No space left.*\(ENOSPC\): \d+ bytes needed.*, \d+ bytes free"
    with pytest.raises(CheckpointError, match=told):
        saver.finish()
    assert newest(tmp_path) == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-0000001"]
    monkeypatch.undo()
    saver.start(header(2), SIZES, record)
    assert saver.finish() is not None and newest(tmp_path) == 2


def leave_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("megacog.runtime.files.shutil.disk_usage", lambda _: SimpleNamespace(free=free))


def test_too_little_space_is_noticed_before_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_free(monkeypatch, needed_bytes(SIZES) - 1)
    with pytest.raises(EnvError, match="not enough disk space"):
        save(tmp_path, 1)
    assert not (tmp_path / "checkpoints").exists()
    leave_free(monkeypatch, needed_bytes(SIZES))
    path = save(tmp_path, 1)
    assert folder_bytes(path) <= needed_bytes(SIZES)


def test_too_little_space_is_noticed_before_frozen_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_free(monkeypatch, needed_bytes(SIZES) + 99)
    with pytest.raises(EnvError, match="not enough disk space"):
        save_frozen(tmp_path, header(), SIZES, record, reserve=100)
    assert not any(tmp_path.iterdir())
    leave_free(monkeypatch, needed_bytes(SIZES) + 100)
    save_frozen(tmp_path, header(), SIZES, record, reserve=100)
    assert folder_bytes(tmp_path / "frozen") <= needed_bytes(SIZES)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


def test_frozen_weights_are_bound_to_the_checkpoint_by_their_hash(tmp_path: Path) -> None:
    fingerprint = save_frozen(tmp_path, header(), SIZES, record)
    reader = open_frozen(tmp_path, fingerprint)
    assert torch.equal(reader.read("b.weight")["weight"], record("b.weight")["weight"])
    with pytest.raises(CheckpointError, match="not the frozen folder"):
        open_frozen(tmp_path, "0" * 64)
    flip_byte(tmp_path / "frozen/frozen-00000-00.safetensors")
    with pytest.raises(CheckpointError, match="checksum"):
        open_frozen(tmp_path, fingerprint)


def test_an_error_of_rank_0_keeps_its_class() -> None:
    from megacog.errors import ConfigError

    def fail() -> None:
        raise ConfigError("wrong key")

    with pytest.raises(ConfigError, match="wrong key"):
        commit.on_rank_0(fail)
