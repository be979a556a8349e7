"""`prepare.py plan`: disk, files, memory and time that a corpus of so many clips takes, before it is prepared.

Sizes are those of the shard format, byte for byte; speed is what was measured, and has to be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megacog.data.dataset import OPEN_SHARDS
from megacog.data.shard_format import ShardMeta
from megacog.prepare.inspect import ShardSet

# In every row: first frame, frames, rate and where id and caption start (int64, int64, float32, 2 x int64).
_ROW_BYTES = 8 + 8 + 4 + 8 + 8
_CHECKSUM_BYTES = 4
_TOKEN_BYTES = 8
# What HDF5 adds to a shard, and to one with token ids; measured, tests/prepare/test_corpus_plan.py.
_SHARD_BYTES, _TOKEN_SHARD_BYTES = 4112, 5144
# Arrays over all clips that training makes: frames, rate, kind and the list of usable clips.
_TRAINING_BYTES = 8 + 8 + 4 + 8


@dataclass(frozen=True)
class ClipShape:
    """An average clip.

    Attributes:
        frames: stored.
        fps: at which they are stored.
        frame_bytes: of one frame's codes.
        id_bytes: of its id in UTF-8.
        caption_bytes: of its caption in UTF-8.
        token_ids: of its text that came tokenized; 0 = captions only.
    """

    frames: float
    fps: float
    frame_bytes: int
    id_bytes: float
    caption_bytes: float
    token_ids: float = 0.0

    @property
    def row_bytes(self) -> float:
        """Everything but codes and checksums."""
        tokens = self.token_ids * _TOKEN_BYTES + 8 if self.token_ids else 0
        return _ROW_BYTES + self.id_bytes + self.caption_bytes + tokens


@dataclass(frozen=True)
class Plan:
    """What a corpus takes.

    Attributes:
        clips: of the corpus.
        frames: stored.
        hours: of video.
        shards: files.
        shard_bytes: of one.
        code_bytes: codes of all frames.
        checksum_bytes: of all frames.
        row_bytes: captions, ids, numbers per clip.
        disk_bytes: all shards.
        bytes_per_clip: of them.
        index_bytes: memory of every training process (loader processes share their parent's).
        open_files: shards that a training process holds open at most.
        prepare_hours: at the measured speed; None without one.
    """

    clips: int
    frames: int
    hours: float
    shards: int
    shard_bytes: int
    code_bytes: int
    checksum_bytes: int
    row_bytes: int
    disk_bytes: int
    bytes_per_clip: float
    index_bytes: int
    open_files: int
    prepare_hours: float | None


def assumed_shape(
    grid: tuple[int, int], codebook_size: int, seconds: float, fps: float, id_bytes: int, caption_bytes: int
) -> ClipShape:
    """Returns a clip of so many seconds, first and last frame included."""
    meta = ShardMeta(grid, codebook_size, "-", "-", "-")
    return ClipShape(int(seconds * fps) + 1, fps, meta.frame_bytes, id_bytes, caption_bytes)


def measured_shape(patterns: Sequence[str]) -> ClipShape:
    """Returns the average clip of shards.

    Raises:
        DataError: a shard is missing or damaged, they do not agree, or hold no clips.
    """
    with ShardSet(patterns) as sample:
        readers = sample.shards
        clips = sample.require_clips()
        frames = sum(int(shard.num_frames.sum()) for shard in readers)
        seconds = sum(float((shard.num_frames / shard.fps.astype(np.float64)).sum()) for shard in readers)
        tokens = sum(shard.num_token_ids for shard in readers)
        ids, captions = (
            sum(len(getattr(shard, name).arrays[0]) for shard in readers) / clips for name in ("clip_ids", "captions")
        )
        return ClipShape(
            frames / clips, frames / seconds, readers[0].meta.frame_bytes, ids, captions, tokens / clips
        )


def plan(clips: int, shape: ClipShape, clips_per_shard: int, clips_per_second: float | None = None) -> Plan:
    """Returns what a corpus takes.

    Args:
        clips: of the corpus.
        shape: of an average clip.
        clips_per_shard: as for `prepare.py run`.
        clips_per_second: measured, of all ranks together.
    """
    shards = -(-clips // clips_per_shard)
    frames = round(clips * shape.frames)
    overhead = _TOKEN_SHARD_BYTES if shape.token_ids else _SHARD_BYTES
    codes, checksums, rows = frames * shape.frame_bytes, frames * _CHECKSUM_BYTES, round(clips * shape.row_bytes)
    disk = codes + checksums + rows + shards * overhead
    return Plan(
        clips=clips,
        frames=frames,
        hours=frames / shape.fps / 3600,
        shards=shards,
        shard_bytes=round(disk / shards),
        code_bytes=codes,
        checksum_bytes=checksums,
        row_bytes=rows,
        disk_bytes=disk,
        bytes_per_clip=disk / clips,
        index_bytes=rows + clips * _TRAINING_BYTES,
        open_files=min(shards, OPEN_SHARDS),
        prepare_hours=clips / clips_per_second / 3600 if clips_per_second else None,
    )


def as_table(plan: Plan) -> str:
    """Returns a plan as lines for people."""
    time = "give --clips-per-second, as `prepare.py run` of a sample prints it"
    if plan.prepare_hours is not None:
        time = f"{plan.prepare_hours:,.1f} hours ({plan.prepare_hours / 24:,.1f} days)"
    rows = [
        ("clips", f"{plan.clips:,}"),
        ("frames", f"{plan.frames:,} ({plan.frames / plan.clips:.1f} per clip), {plan.hours:,.0f} hours of video"),
        ("shards", f"{plan.shards:,} files of {_size(plan.shard_bytes)}"),
        ("disk", f"{_size(plan.disk_bytes)} ({plan.bytes_per_clip:,.0f} bytes per clip)"),
        ("  codes", _size(plan.code_bytes)),
        ("  checksums", _size(plan.checksum_bytes)),
        ("  texts and numbers", _size(plan.row_bytes)),
        ("to merge or reshard", f"{_size(2 * plan.disk_bytes)}: the old shards and the new"),
        ("memory of training", f"{_size(plan.index_bytes)} in every process (loader processes share their parent's)"),
        ("open files", f"{plan.open_files} at most in every training process"),
        ("time to prepare", time),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def as_record(plan: Plan) -> dict[str, Any]:
    """Returns a plan as a JSON-able dict."""
    return asdict(plan)


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
