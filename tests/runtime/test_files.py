from __future__ import annotations

import builtins
import errno
import hashlib
import os
import shutil
import zlib
from pathlib import Path

import pytest

from megacog.errors import EnvError
from megacog.runtime.files import (
    FolderKind,
    atomic_directory,
    atomic_file,
    crc32_file,
    require_space,
    sha256_file,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_not_there_before_the_block_ends_and_complete_after(tmp_path: Path) -> None:
    path = tmp_path / "new" / "data.bin"
    with atomic_file(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert names(path.parent) == ["data.bin"]


def test_text_is_utf8_with_newlines_as_written(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.txt", "w") as file:
        file.write("\u79d2\r\nx\n")
    assert (tmp_path / "a.txt").read_bytes() == "\u79d2\r\nx\n".encode()


def test_an_error_in_the_block_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["data.bin"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvError, match=r"data\.bin.*space"), atomic_file(tmp_path / "data.bin") as file:
        file.write(b"abc")
    assert names(tmp_path) == []


def test_a_full_disk_at_opening_is_the_same_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(EnvError, match="no space left"), atomic_file(tmp_path / "data.bin"):
        pass


def test_other_write_errors_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "file" / "inner"):
        pass


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode"), atomic_file(tmp_path / "a", "r"):
        pass


def test_a_directory_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "export"
    with atomic_directory(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("1")
        assert not target.exists()
    assert (target / "inner" / "a").read_text() == "1"
    assert names(tmp_path / "runs") == ["export"]


def test_an_existing_directory_is_refused_before_any_work_is_done(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "keep").write_text("")
    entered = False
    with pytest.raises(EnvError, match="exists already"), atomic_directory(tmp_path / "export"):
        entered = True
    assert not entered
    assert names(tmp_path) == ["export"]


KIND = FolderKind("kind.json", "ours")


def make_old(folder: Path) -> None:
    folder.mkdir()
    (folder / "old").write_text("")
    (folder / "kind.json").write_text('{"format": "ours"}')


@pytest.mark.parametrize("content", ['{"format": "theirs"}', '{"name": "x"}', "[]", '"ours"', '{"format": "ou'])
def test_a_file_of_the_same_name_does_not_make_a_folder_ours(tmp_path: Path, content: str) -> None:
    make_old(tmp_path / "theirs")
    (tmp_path / "theirs" / "kind.json").write_text(content)
    with pytest.raises(EnvError, match="holds no kind.json of ours"):
        with atomic_directory(tmp_path / "theirs", replace=KIND):
            pytest.fail("the block must not run")
    assert names(tmp_path / "theirs") == ["kind.json", "old"]


def test_replace_swaps_the_directory_and_removes_the_old_one(tmp_path: Path) -> None:
    make_old(tmp_path / "export")
    with atomic_directory(tmp_path / "export", replace=KIND) as folder:
        (folder / "new").write_text("")
    assert names(tmp_path / "export") == ["new"]
    assert names(tmp_path) == ["export"]


def test_a_failed_replacement_keeps_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_old(tmp_path / "export")
    rename = os.rename

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "export" and (Path(source) / "new").exists():
            raise OSError(errno.ENOSPC, "full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(EnvError, match="export"):
        with atomic_directory(tmp_path / "export", replace=KIND) as folder:
            (folder / "new").write_text("")
    assert names(tmp_path / "export") == ["kind.json", "old"]
    assert names(tmp_path) == ["export"]


def test_replacing_spares_files_and_folders_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_text("mine")
    for name, message in (("file", "is a file"), ("videos", "holds no kind.json"), ("file/below", "file is a file")):
        with pytest.raises(EnvError, match=message), atomic_directory(tmp_path / name, replace=KIND):
            pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "mine" and names(tmp_path / "videos") == ["a.mp4"]
    assert names(tmp_path) == ["file", "videos"]


def test_an_error_in_the_block_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "export") as folder:
        (folder / "a").write_text("")
        raise RuntimeError
    assert names(tmp_path) == []


def test_checksums_agree_with_those_of_the_bytes(tmp_path: Path) -> None:
    content = os.urandom(3_000_001)
    path = tmp_path / "data"
    path.write_bytes(content)
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()
    assert crc32_file(path) == zlib.crc32(content)


def test_missing_space_is_told_with_needed_and_free_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 93, 7))
    require_space(tmp_path / "not" / "there" / "yet", 7)
    with pytest.raises(EnvError, match=r"8 bytes .* needed, 7 bytes .* free"):
        require_space(tmp_path / "not" / "there" / "yet", 8)
