"""Shards that are cut, flipped, locked, deleted or lie: told before a sample of them is used, or no bit differs."""

from __future__ import annotations

import fcntl
import json
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from command_line import Command, TrainingArguments, assert_tells, files

from megacog.data import dataset
from megacog.data.shards import Shard, ShardWriter
from megacog.tokenizers.text import TextTokenizer
from megacog.training.loop import Loop

Figure = Callable[[str], None]
PAGE = 512
"""Bytes that a failing disk loses at once."""


@pytest.fixture
def shard(world: Path) -> Path:
    return world / "inputs/train.h5"


def content(path: Path) -> list[Any]:
    """Everything that a reader can get from a shard."""
    with Shard(path) as shard:
        frames = [shard.read(clip, slice(None)).tolist() for clip in range(shard.num_clips)]
        return [shard.meta, list(shard.captions), list(shard.clip_ids), shard.fps.tolist(), frames]


def losses(run: Path) -> list[float]:
    """Loss of each step that a run recorded."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def damaged_copies(data: bytes, generator: random.Random) -> Iterator[tuple[str, bytes]]:
    """(kind, bytes) of many ways in which copies and disks damage a file."""
    for size in [0, 1, 8, 512, len(data) - 1, *(generator.randrange(len(data)) for _ in range(25))]:
        yield "truncated", data[:size]
    for _ in range(120):
        changed = bytearray(data)
        changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        yield "one bit flipped", bytes(changed)
    for _ in range(25):
        first = generator.randrange(len(data) // PAGE) * PAGE
        yield "a page of zeros", data[:first] + bytes(PAGE) + data[first + PAGE :]
    for _ in range(25):
        first, second = sorted(generator.sample(range(len(data) // PAGE), 2))
        pages = [data[at * PAGE : (at + 1) * PAGE] for at in (first, second)]
        changed = bytearray(data)
        changed[first * PAGE : (first + 1) * PAGE], changed[second * PAGE : (second + 1) * PAGE] = pages[::-1]
        yield "two pages exchanged", bytes(changed)


def test_verify_tells_every_damaged_copy_of_a_shard(
    command: Command, shard: Path, tmp_path: Path, figure: Figure
) -> None:
    data, original, path = shard.read_bytes(), content(shard), tmp_path / "copy.h5"
    told: dict[str, list[bool]] = {}
    for kind, copy in damaged_copies(data, random.Random(20)):
        if copy == data:
            continue
        path.write_bytes(copy)
        outcome = command("prepare", "verify", path)
        told.setdefault(kind, []).append(outcome.code == 1)
        if outcome.code == 1:
            assert_tells(outcome.out, f"BAD .*{path.name}")
        else:
            assert content(path) == original, f"{kind}, and nobody saw it"
    for kind, each in told.items():
        figure(f"shards, {kind}: {len(each)} copies, told {sum(each)}, in padding {len(each) - sum(each)}, silent 0")
        assert sum(each) > 0.9 * len(each)


def test_training_on_a_flipped_bit_stops_or_is_bitwise_the_same(
    command: Command, training: TrainingArguments, shard: Path, tmp_path: Path, figure: Figure
) -> None:
    """Every frame of the shard is used once in the one step."""

    def train(path: Path, run: str) -> Any:
        arguments = training(data__train=[{"path": str(path)}], data__workers=1, train__steps=1)
        return command("pretrain", *arguments, f"train.run_dir={tmp_path / run}", "checkpoint.every=0")

    small = tmp_path / "small.h5"
    with Shard(shard) as like, ShardWriter(small, like.meta) as writer:
        for clip in range(8):
            writer.add(str(clip), like.captions[clip], like.read(clip, [0]), 8.0)
        size = 8 * like.meta.frame_bytes
    assert train(small, "intact").code == 0
    expected, data, generator = losses(tmp_path / "intact"), small.read_bytes(), random.Random(1)
    with h5py.File(small) as file:
        first = file["frames"].id.get_offset()
    places = [generator.randrange(first, first + size) for _ in range(5)] + generator.sample(range(len(data)), 5)
    told = 0
    for number, place in enumerate(places):
        changed = bytearray(data)
        changed[place] ^= 1 << generator.randrange(8)
        path = tmp_path / f"flipped-{number}.h5"
        path.write_bytes(changed)
        outcome = train(path, f"run-{number}")
        if outcome.code == 0:
            assert losses(tmp_path / f"run-{number}") == expected, f"byte {place}"
        else:
            assert_tells(outcome.message, path.name)
            told += 1
    assert told >= 5
    figure(f"training on a shard with one bit flipped: 10 runs, stopped {told}, bitwise the same {10 - told}")


# ---- shards that lie though their checksums fit ----------------------------------------------------------------------


def replaced_frames(dtype: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "r+", libver="latest") as file:
            frames = file["frames"][...]
            del file["frames"]
            file.create_dataset("frames", data=frames.astype(dtype))

    return change


def changed_array(name: str, index: int, value: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "r+", libver="latest") as file:
            values = file[name][...]
            values[index] = value
            file[name][...] = values
            file[name].attrs["crc32"] = np.uint32(zlib.crc32(values))

    return change


def larger_codes(path: Path) -> None:
    with h5py.File(path, "r+", libver="latest") as file:
        file.attrs["codebook_size"] = np.int64(9)


def no_clips(path: Path) -> None:
    with Shard(path) as shard:
        meta = shard.meta
    with ShardWriter(path, meta):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced_frames("<i4"), "/frames is int32 .*expected uint16"),
        (replaced_frames("<f4"), "/frames is float32 .*expected uint16"),
        (replaced_frames("<u1"), "/frames is uint8 .*expected uint16"),
        (larger_codes, "codebook_size 9, model.image_vocab_size is 24"),
        (changed_array("clips/first_frame", 3, 1 << 40), "clips lie outside the frames"),
        (changed_array("clips/first_frame", 3, -1), "clips lie outside the frames"),
        (changed_array("clips/num_frames", 3, 0), "clips lie outside the frames"),
        (changed_array("clips/fps", 3, float("nan")), "impossible rates"),
        (changed_array("clips/fps", 3, -8.0), "impossible rates"),
        (changed_array("clips/caption_offsets", 3, 1 << 40), "/clips/caption_offsets does not fit"),
        (no_clips, "holds no clips"),
        (lambda path: path.write_bytes(b""), "is not an HDF5 file"),
    ],
)  # fmt: skip
def test_a_shard_that_cannot_be_true_is_refused_before_training(
    command: Command,
    training: TrainingArguments,
    shard: Path,
    tmp_path: Path,
    change: Callable[[Path], object],
    message: str,
) -> None:
    path = tmp_path / "bad.h5"
    path.write_bytes(shard.read_bytes())
    change(path)
    outcome = command("pretrain", *training(data__train=[{"path": str(path)}]))
    assert outcome.code == 1
    assert_tells(outcome.message, f"bad.h5.*{message}")
    assert not (tmp_path / "run").exists()


def test_token_ids_beyond_the_vocabulary_are_refused_with_the_clip(
    command: Command, training: TrainingArguments, world: Path, shard: Path, tmp_path: Path
) -> None:
    tokenizer = TextTokenizer.load(world / "inputs/text")
    with Shard(shard) as like:
        meta = like.meta
    with ShardWriter(tmp_path / "bad.h5", meta, tokenizer.fingerprint) as writer:
        for clip, highest in (("fine", 5), ("beyond", tokenizer.vocab_size)):
            writer.add(clip, "a caption", np.zeros((17, *meta.grid), np.int64), 8.0, [3, highest])
    outcome = command("pretrain", *training(data__train=[{"path": str(tmp_path / "bad.h5")}]))
    assert outcome.code == 1
    assert_tells(outcome.message, f"bad.h5: clip 'beyond' has token id {tokenizer.vocab_size}")


# ---- shards that change their state under a run ----------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_shard_that_somebody_has_locked_is_read(
    command: Command, training: TrainingArguments, shard: Path, tmp_path: Path
) -> None:
    with locked(shard):
        outcome = command("pretrain", *training(data__workers=1), "checkpoint.every=0")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(("open_shards", "code"), [(256, 0), (1, 1)])
def test_a_shard_that_is_deleted_under_a_run_is_read_on_or_named(
    command: Command,
    training: TrainingArguments,
    shard: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    open_shards: int,
    code: int,
) -> None:
    """What a process holds open stays; with more shards than it may hold open, a deleted one is missed."""
    paths = [tmp_path / f"{number}.h5" for number in range(2)]
    for number, path in enumerate(paths):
        with Shard(shard) as like, ShardWriter(path, like.meta) as writer:
            for clip in range(6):
                writer.add(f"{number}-{clip}", "the digit 3 moves left", like.read(clip, slice(None)), 8.0)
    monkeypatch.setattr(dataset, "OPEN_SHARDS", open_shards)
    arguments = training(data__train=[{"path": str(path)} for path in paths], train__steps=6, train__log_every=1)
    arguments = (*arguments, "checkpoint.every=0", "train.eval_every=0")
    assert command("pretrain", *arguments, f"train.run_dir={tmp_path / 'intact'}").code == 0
    step = Loop.train_step

    def delete_at_3(self: Loop, batches: Any, number: int) -> Any:
        if number == 3:
            paths[1].unlink()
        return step(self, batches, number)

    monkeypatch.setattr(Loop, "train_step", delete_at_3)
    outcome = command("pretrain", *arguments)
    assert outcome.code == code
    expected = losses(tmp_path / "intact")
    if code:
        assert_tells(outcome.message, "1.h5 cannot be opened any more: No such file")
        assert losses(tmp_path / "run") == expected[:2]
        assert not any("export" in name or ".tmp-" in name for name in files(tmp_path / "run"))
    else:
        assert losses(tmp_path / "run") == expected
