"""`convert.py verify RUN`: every damage to what a run has written is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_checkpoints import SIZES, flip_byte, header, record, save

from megacog.checkpoint.manifest import FILE_NAME
from megacog.checkpoint.store import save_frozen
from megacog.errors import CheckpointError
from megacog.interop.main import main

SECOND = "checkpoints/step-0000002"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    frozen = save_frozen(tmp_path, header(), SIZES, record)
    for step in (1, 2):
        save(tmp_path, step, frozen=frozen, loss=0.5)
    return tmp_path


def verify(run_dir: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, list[str]]:
    code = main(["verify", str(run_dir), *flags])
    return code, capsys.readouterr().out.splitlines()


def test_a_whole_run_is_told_thing_by_thing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints/.step-0000003.tmp-0123456789ab").mkdir()
    code, lines = verify(run_dir, capsys, "--full")
    names = [line.split()[0] for line in lines]
    assert code == 0
    assert names[:4] == [SECOND, "checkpoints/step-0000001", "frozen", "checkpoints/.step-0000003.tmp-0123456789ab"]
    assert "whole      24 samples, 1 ranks, evaluation loss 0.5000" in lines[0] and "unfinished" in lines[3]
    assert lines[-1].endswith("4 things checked (every byte), 0 damaged")


@pytest.mark.parametrize(
    ("folder", "told"),
    [("gone", "no such folder"), ("begun", "no checkpoints yet"), ("saving", "no checkpoints yet")],
)
def test_a_folder_that_holds_nothing_to_check_is_told(tmp_path: Path, folder: str, told: str) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/command.txt").touch()
    (tmp_path / "saving/checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"{folder}: {told}"):
        main(["verify", str(tmp_path / folder)])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("where", "damage", "flags", "told"),
    [
        (f"{SECOND}/records-00000-00.safetensors", cut, (), "bytes instead of"),
        (f"{SECOND}/records-00000-00.safetensors", flip_byte, ("--full",), "its checksum differs"),
        (f"{SECOND}/rng-00000-00.safetensors", Path.unlink, (), "is missing"),
        (f"{SECOND}/{FILE_NAME}", flip_byte, (), "is damaged"),
        ("frozen/frozen-00000-00.safetensors", flip_byte, ("--full",), "its checksum differs"),
        ("frozen", shutil.rmtree, (), "frozen, which is missing"),
    ],
)  # fmt: skip
def test_damage_is_named_and_the_exit_code_is_1(
    run_dir: Path, capsys: pytest.CaptureFixture[str], where: str, damage: Callable[[Path], None],
    flags: tuple[str, ...], told: str,
) -> None:  # fmt: skip
    damage(run_dir / where)
    code, lines = verify(run_dir, capsys, *flags)
    assert code == 1
    damaged = [line for line in lines if "DAMAGED" in line]
    assert damaged and all(told in line for line in damaged)
    if where != "frozen":
        assert len(damaged) == 1 and damaged[0].startswith(where.rpartition("/")[0])


def test_frozen_weights_of_another_run_are_told(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_frozen(run_dir, header(step=9), SIZES, record)
    code, lines = verify(run_dir, capsys)
    assert code == 1 and sum("does not hold the frozen weights" in line for line in lines) == 2
