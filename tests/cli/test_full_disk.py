"""No disk space: an error that says so, and no half of a checkpoint, export, shard, clip or tokenizer."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import Command, TrainingArguments, assert_tells, files, prepare_arguments

from megacog.training import pretrain

Disk = Callable[[int], Any]


@pytest.fixture(params=["full", "limited"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """`with small_disk(kib) as folder:` gives a folder that takes files of no more than that.

    "full" is a tiny file system (where mounting is not allowed: every sync says that the disk is full);
    "limited" is a limit on the size of files, which strikes in the middle of writing one.
    """

    @contextmanager
    def full(kib: int) -> Iterator[Path]:
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            try:
                yield folder
            finally:
                subprocess.run(["umount", "-l", str(folder)], check=True)
            return

        def no_space(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_space)
            yield folder

    @contextmanager
    def limited(kib: int) -> Iterator[Path]:
        folder = tmp_path / "disk"
        folder.mkdir()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, hard))
        try:
            yield folder
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return full if request.param == "full" else limited


NO_SPACE = "not enough disk space|[Nn]o space left|File too large"


def test_checkpoints_on_a_full_disk(command: Command, training: TrainingArguments, small_disk: Disk) -> None:
    arguments = training()
    with small_disk(64) as disk:
        outcome = command("pretrain", *arguments, f"train.run_dir={disk / 'run'}")
        left = files(disk)
    assert outcome.code == 1
    assert_tells(outcome.message, NO_SPACE)
    assert not [name for name in left if ".tmp-" in name or "step-" in name or "export" in name]


def test_exports_on_a_full_disk(
    command: Command, training: TrainingArguments, small_disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the export is left to be written; the weights of this model are larger than the disk.
    monkeypatch.setattr(pretrain.RunState, "save", lambda self, step, loss: None)
    arguments = training()
    with small_disk(64) as disk:
        outcome = command("pretrain", *arguments, f"train.run_dir={disk / 'run'}")
        left = files(disk)
    assert outcome.code == 1
    assert_tells(outcome.message, NO_SPACE)
    assert not [name for name in left if ".tmp-" in name or "export" in name]


def test_shards_on_a_full_disk(command: Command, world: Path, small_disk: Disk) -> None:
    with small_disk(2) as disk:
        outcome = command("prepare", *prepare_arguments(world, world / "videos/captions.csv", disk / "made/clips"))
        left = files(disk)
    assert outcome.code == 1
    assert_tells(outcome.message, NO_SPACE)
    assert not [name for name in left if ".tmp-" in name or name.endswith((".h5", "clips.json"))]


def test_clips_on_a_full_disk(command: Command, world: Path, small_disk: Disk) -> None:
    with small_disk(4) as disk:
        arguments = [world / "prompts.txt", "--model", world / "made/export", "--out", disk / "out"]
        outcome = command("infer", *arguments, "levels=1", "--scale", "16")
        left = files(disk)
    assert outcome.code == 1
    assert_tells(outcome.message, NO_SPACE)
    assert left.keys() <= {"out"}


def test_tokenizers_on_a_full_disk(command: Command, world: Path, small_disk: Disk) -> None:
    with small_disk(4) as disk:
        captions = world / "videos/captions.csv"
        outcome = command("train_tokenizer", "text", captions, "--out", disk / "text", "--vocab-size", 60)
        left = files(disk)
    assert outcome.code == 1
    assert_tells(outcome.message, NO_SPACE)
    assert left == {}
