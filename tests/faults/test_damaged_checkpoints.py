"""Damage to any file of a checkpoint, frozen weights or an export is noticed before use, and the one before is taken.

Also what must not matter: clocks, hints, a rank that is slow in a save. tests/checkpoint covers damage kind by kind.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from small_checkpoints import EVERYTHING, newest, save, save_with, steps_in
from tiny_run import make_inputs, settings, write_config

from megacog.checkpoint import records
from megacog.checkpoint.discovery import LATEST, find_checkpoint
from megacog.checkpoint.export import open_export
from megacog.checkpoint.retention import Retention
from megacog.checkpoint.saver import Saver
from megacog.checkpoint.store import open_frozen
from megacog.errors import CheckpointError, MegacogError
from megacog.metrics.record import read_records
from megacog.training import pretrain


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def train(inputs: Path, run_dir: Path, stage: str = "base", inherit: Path | None = None) -> None:
    values = settings(inputs, run_dir, stage, engine="torch", steps=2, eval_every=0, global_batch_size=2)
    values["checkpoint"] = {"every": 1, "keep_last": 9, "asynchronous": False}
    if inherit is not None:
        values["model"]["inherit"] = str(inherit)
    assert pretrain.main(["--config", str(write_config(run_dir.with_suffix(".yaml"), values))]) == 0


@pytest.fixture(scope="module")
def run_dir(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2, frozen weights and an export."""
    folder = tmp_path_factory.mktemp("runs")
    train(inputs, folder / "base")
    train(inputs, folder / "run", "sequential", folder / "base/export")
    return folder / "run"


def damages(content: bytes, chance: random.Random) -> Iterator[bytes | None]:
    """Ten truncations, ten flipped bits, nothing left, no file (None)."""
    for end in chance.choices(range(len(content)), k=10):
        yield content[:end]
    for bit in chance.choices(range(8 * len(content)), k=10):
        yield content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]
    yield b""
    yield None


def undetected(folder: Path, use: Callable[[], object]) -> tuple[list[str], int]:
    """Damages of files of a folder that `use` does not notice, and how many were tried."""
    use()
    missed, tried, chance = [], 0, random.Random(7)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for number, damaged in enumerate(damages(content, chance)):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            tried += 1
            try:
                use()
                missed.append(f"{path.name}: damage {number}")
            except MegacogError as error:
                assert path.name in str(error) or folder.name in str(error), f"{error} names neither file nor folder"
            path.write_bytes(content)
    use()
    return missed, tried


def test_every_damage_to_a_checkpoint_is_noticed_and_the_one_before_is_taken(
    run_dir: Path, figure: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = run_dir / "checkpoints/step-0000002"

    def use() -> None:
        caplog.clear()
        found = find_checkpoint(run_dir, "auto")
        assert found is not None
        if found[1].step != 2:
            assert found[1].step == 1
            raise CheckpointError(caplog.text)

    assert len(list(path.iterdir())) == 3
    missed, tried = undetected(path, use)
    assert not missed
    figure(f"damaged checkpoints: noticed {tried} of {tried}, the one before taken each time")


def test_every_damage_to_frozen_weights_is_noticed(run_dir: Path, figure: Callable[[str], None]) -> None:
    found = find_checkpoint(run_dir, "must")
    assert found is not None and found[1].frozen is not None
    missed, tried = undetected(run_dir / "frozen", lambda: open_frozen(run_dir, str(found[1].frozen)))
    assert not missed
    figure(f"damaged frozen weights: noticed {tried} of {tried}")


def test_every_damage_to_an_export_is_noticed(run_dir: Path, figure: Callable[[str], None]) -> None:
    missed, tried = undetected(run_dir / "export", lambda: open_export(run_dir / "export", verify=True))
    assert not missed
    figure(f"damaged exports: noticed {tried} of {tried}")


def test_every_single_flipped_byte_of_a_small_checkpoint_is_noticed(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    save(tmp_path, 1)
    path, missed, tried = save(tmp_path, 2), [], 0
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        step = max(1, len(content) // 1000)  # generator states are 5,000 bytes that one checksum covers
        for index in range(0, len(content), step):
            file.write_bytes(content[:index] + bytes([content[index] ^ 0x20]) + content[index + 1 :])
            tried += 1
            if newest(tmp_path) != 1:
                missed.append((file.name, index))
        file.write_bytes(content)
    assert newest(tmp_path) == 2 and not missed
    figure(f"flipped bytes of a small checkpoint: noticed {tried} of {tried}")


@pytest.mark.parametrize("kind", ["folder", "dead link", "not text"])
def test_a_hint_that_is_no_file_of_ours_stops_nothing(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 1)
    hint = tmp_path / "checkpoints" / LATEST
    hint.unlink()
    if kind == "folder":
        hint.mkdir()
    elif kind == "dead link":
        hint.symlink_to(tmp_path / "nowhere")
    else:
        hint.write_bytes(b"\xff\xfe\r\n")
    assert newest(tmp_path) == 1
    save(tmp_path, 2)
    assert newest(tmp_path) == 2


def test_no_time_of_a_file_decides_which_checkpoint_is_newest_or_goes(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Retention(last=2), asynchronous=False)
    for step, offset in ((1, 9e6), (2, -9e6), (3, -1e6)):  # the oldest from the future, the newest from the past
        path = save_with(saver, step).path
        for file in (*path.iterdir(), path, tmp_path / "checkpoints", tmp_path):
            os.utime(file, (time.time() + offset,) * 2)
    assert steps_in(tmp_path) == [2, 3] and newest(tmp_path) == 3


def test_a_clock_that_jumps_by_hours_changes_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(inputs, tmp_path / "steady")
    clock, chance = time.time, random.Random(1)
    monkeypatch.setattr(time, "time", lambda: clock() + chance.choice([-3600, 0, 3600]))
    train(inputs, tmp_path / "jumping")
    losses = [
        [record["loss"] for record in read_records(tmp_path / name / "metrics.jsonl") if record["kind"] == "train"]
        for name in ("steady", "jumping")
    ]
    assert len(losses[0]) == 2 and losses[0] == losses[1]
    assert steps_in(tmp_path / "jumping") == [1, 2]


def slow_save(run_dir: Path, folder: Path, rank: int) -> None:
    """One of two ranks of a save, of which rank 1 writes when it is told to."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    save_tensors = records.save_tensors

    def wait(*arguments: object) -> None:
        (folder / "waiting").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        save_tensors(*arguments)  # type: ignore[arg-type]

    if rank == 1:
        records.save_tensors = wait  # type: ignore[attr-defined]
    save_with(Saver(run_dir, EVERYTHING, asynchronous=False), 2)
    os._exit(0)


def test_nothing_is_published_before_the_slowest_rank_has_written(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    save(run_dir, 1)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=slow_save, args=(run_dir, tmp_path, rank)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)  # rank 0 has long written
    assert (run_dir / "checkpoints" / LATEST).read_text() == "step-0000001\n"
    assert newest(run_dir) == 1 and steps_in(run_dir) == [1]
    copy = shutil.copytree(run_dir, tmp_path / "copy")  # what a kill at this moment would leave
    assert newest(copy) == 1
    (tmp_path / "go").touch()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert (run_dir / "checkpoints" / LATEST).read_text() == "step-0000002\n" and newest(run_dir) == 2
