"""Videos and captions to shards of codes.

Clips are decoded by several processes and coded here, in the order of the caption file. A shard is a
fixed slice of that file (rows that fail leave a gap), so its bytes depend on nothing but its rows:
not on the number of workers or ranks, nor on when a run was killed and continued.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megacog.data.shards import ShardMeta, ShardWriter
from megacog.errors import DataError
from megacog.prepare.containers import ClipError
from megacog.prepare.decode import DecodedClip, DecodeSettings, decode_clip, decoder_name
from megacog.prepare.meter import Meter
from megacog.prepare.sharing import Desk, LocalWork, RemoteWork, Slice, Work
from megacog.prepare.sources import Failure, Row, Source, printable, split_rows
from megacog.prepare.state import Part, PartialOutput, SliceRecord, produce
from megacog.prepare.workers import Decode, DecodePool, WorkerLimits
from megacog.runtime.files import require_space, sha256_file
from megacog.runtime.log import get_logger

if TYPE_CHECKING:
    from megacog.tokenizers.frames import FrameTokenizer

logger = get_logger(__name__)


@dataclass(frozen=True)
class PrepareSettings:
    """What `prepare` is to do.

    Attributes:
        out: folder and stem of the shards, e.g. data/clips.
        decode: how clips become frames.
        limits: of one decoder process.
        workers: decoder processes; no effect on the result.
        clips_per_shard: rows of the caption file per shard.
        eval_fraction: share of videos that go to `<stem>-eval`; 0 = one set, `<stem>`.
        batch: frames given to the tokenizer at once; no effect on the result.
        overwrite: remove what an earlier run left under the stem first.
    """

    out: Path
    decode: DecodeSettings
    limits: WorkerLimits = WorkerLimits()
    workers: int = 1
    clips_per_shard: int = 1000
    eval_fraction: float = 0.0
    batch: int = 64
    overwrite: bool = False


@dataclass(frozen=True)
class Summary:
    """What a preparation made.

    Attributes:
        shards: the files.
        clips: clips in them.
        frames: frames in them.
        hours: length of the clips.
        num_bytes: size of the files.
        failed: rows without a clip.
        failed_path: file that lists them, if any.
        seconds: time that this run took.
        earlier: the shards were there already; nothing was done.
    """

    shards: list[Path]
    clips: int
    frames: int
    hours: float
    num_bytes: int
    failed: int
    failed_path: Path | None
    seconds: float
    earlier: bool = False


def prepare(
    source: Source,
    tokenizer: FrameTokenizer,
    settings: PrepareSettings,
    decode: Decode = decode_clip,
    desk: Desk | None = None,
) -> Summary:
    """Makes the shards of a caption file, or finishes making them, and returns what was made.

    Args:
        source: the rows.
        tokenizer: codes the frames.
        settings: everything else.
        decode: decodes one clip, in a process of its own.
        desk: where other ranks ask for their share; they call `assist`.

    Raises:
        ConfigError: the output belongs to a run with other settings.
        DataError: not one clip could be prepared, or the frame size does not fit the tokenizer.
        EnvError: no disk space, or no decoder.
    """
    start = time.monotonic()
    meta = _shard_meta(tokenizer, settings.decode)
    slices, parts = _plan(source, settings)

    def make(output: PartialOutput) -> list[Failure]:
        _make_slices(slices, output, tokenizer, meta, settings, decode, desk)
        failures = _all_failures(source, slices, output)
        if len(failures) == len(source.rows) + len(source.failures):
            path = output.write_failures(failures)
            output.discard([part.stem for part in parts])
            raise DataError(
                f"not one of {len(failures)} rows of {source.path} could be prepared; {path} says why "
                f"(line {failures[0].line}: {failures[0].reason}). Mend them and run again."
            )
        return source.failures

    recorded = _recorded_settings(source, meta, settings)
    with desk or nullcontext():
        manifest, earlier = produce(settings.out, recorded, parts, make, overwrite=settings.overwrite)
    return summarize(settings.out, manifest, start, earlier)


def assist(
    work: RemoteWork, tokenizer: FrameTokenizer, settings: PrepareSettings, decode: Decode = decode_clip
) -> None:
    """Makes this rank's share of the slices that `prepare` hands out on rank 0; ends when everything is done.

    Args:
        work: as seen from here.
        tokenizer: see `prepare`, as the following; all as on rank 0.
        settings: workers may differ.
        decode: decodes one clip.

    Raises:
        EnvError: no decoder, or this rank sees another output folder than rank 0.
    """
    output = PartialOutput(settings.out)
    _work(work, output, tokenizer, _shard_meta(tokenizer, settings.decode), settings, decode)
    work.leave()


def what_shards_depend_on(tokenizer: FrameTokenizer, settings: PrepareSettings) -> dict[str, Any]:
    """Returns all that decides the bytes of a slice's shard, but for its rows."""
    return {**asdict(_shard_meta(tokenizer, settings.decode)), **asdict(settings.decode)}


def encode_in_batches(
    clips: Iterable[NDArray[np.uint8]], tokenizer: FrameTokenizer, batch: int
) -> Iterator[NDArray[np.int64]]:
    """Yields the codes [n, h, w] of each clip [n, H, W, 3], coding frames of several clips at once."""
    waiting: list[NDArray[np.uint8]] = []
    count = 0
    for frames in clips:
        waiting.append(frames)
        count += len(frames)
        if count >= batch:
            yield from _encode(waiting, tokenizer, batch)
            waiting, count = [], 0
    yield from _encode(waiting, tokenizer, batch)


def _encode(
    clips: Sequence[NDArray[np.uint8]], tokenizer: FrameTokenizer, batch: int
) -> Iterator[NDArray[np.int64]]:
    import torch

    if not clips:
        return
    frames_BHWC = torch.from_numpy(np.concatenate(clips))
    codes_Bhw = torch.cat(
        [tokenizer.encode(group).cpu() for group in torch.split(frames_BHWC, batch)]
    ).numpy()
    first = 0
    for frames in clips:
        yield codes_Bhw[first : first + len(frames)]
        first += len(frames)


def _shard_meta(tokenizer: FrameTokenizer, decode: DecodeSettings) -> ShardMeta:
    described = {
        "fps": decode.fps,
        "size": [decode.height, decode.width],
        "folder_fps": decode.folder_fps,
        "resize": "bicubic, antialiased, center crop",
        "sampling": "nearest frame",
    }
    return ShardMeta(
        grid=tokenizer.grid(decode.height, decode.width),
        codebook_size=tokenizer.codebook_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        decoder=decoder_name(),
        settings=json.dumps(described, sort_keys=True),
    )


def _recorded_settings(source: Source, meta: ShardMeta, settings: PrepareSettings) -> dict[str, Any]:
    """Returns everything that the shards' bytes depend on."""
    return {
        "captions_sha256": source.sha256,
        "video_column": source.video_column,
        "caption_column": source.caption_column,
        "root": settings.decode.root,
        "allow_absolute": settings.decode.allow_absolute,
        "fps": settings.decode.fps,
        "size": [settings.decode.height, settings.decode.width],
        "folder_fps": settings.decode.folder_fps,
        "max_frames": settings.decode.max_frames,
        "max_pixels": settings.decode.max_pixels,
        "clips_per_shard": settings.clips_per_shard,
        "eval_fraction": settings.eval_fraction,
        "frame_tokenizer": meta.tokenizer_fingerprint,
        "decoder": meta.decoder,
    }


def _plan(source: Source, settings: PrepareSettings) -> tuple[list[Slice], list[Part]]:
    """Returns the slices in the order in which they are made, and the parts that they belong to."""
    slices: list[Slice] = []
    parts = []
    size = settings.clips_per_shard
    for name, rows in split_rows(source.rows, settings.eval_fraction).items():
        stem = settings.out.with_name(f"{settings.out.name}-{name}") if name else settings.out
        starts = range(0, len(rows), size)
        parts.append(Part(stem, len(starts)))
        for index, first in enumerate(starts):
            slices.append(Slice(len(slices), parts[-1], index, rows[first : first + size]))
    return slices, parts


def _make_slices(
    slices: Sequence[Slice],
    output: PartialOutput,
    tokenizer: FrameTokenizer,
    meta: ShardMeta,
    settings: PrepareSettings,
    decode: Decode,
    desk: Desk | None,
) -> None:
    """Makes the slices that are not finished yet, with the other ranks if there are any."""
    todo = [piece for piece in slices if output.record(piece.part, piece.index) is None]
    total = sum(len(piece.rows) for piece in slices)
    left = sum(len(piece.rows) for piece in todo)
    if left < total:
        logger.info("%s: continuing, %d of %d rows are done", output.folder, total - left, total)
    if not todo:
        return
    if desk is not None and len(todo) < desk.ranks:
        logger.warning(
            "%d ranks have only %d shards to make, so %d are idle; a smaller --clips-per-shard would occupy them",
            desk.ranks, len(todo), desk.ranks - len(todo),
        )  # fmt: skip
    made_bytes = made_rows = 0

    def keep(piece: Slice, record: SliceRecord) -> None:
        nonlocal made_bytes, made_rows
        output.finish_slice(piece.part, piece.index, record)
        made_bytes, made_rows = made_bytes + record.num_bytes, made_rows + len(piece.rows)
        # A full disk shows now, not hours later.
        require_space(output.folder, made_bytes * (left - made_rows) // made_rows)

    with Meter(total, total - left) as meter:
        work = LocalWork(todo, meter, keep)
        if desk is not None:
            desk.open(work, todo)
        settings = replace(settings, workers=min(settings.workers, left))
        _work(work, output, tokenizer, meta, settings, decode)
        work.wait()


def _work(
    work: Work,
    output: PartialOutput,
    tokenizer: FrameTokenizer,
    meta: ShardMeta,
    settings: PrepareSettings,
    decode: Decode,
) -> None:
    """Takes slices and makes them until there are no more."""
    taken: deque[Slice] = deque()

    def videos(pieces: Iterable[Slice]) -> Iterator[str]:
        for piece in pieces:
            taken.append(piece)
            yield from (row.video for row in piece.rows)

    pieces = iter(work.take, None)
    first = next(pieces, None)
    if first is None:
        return
    output.require_shared()
    with DecodePool(settings.workers, settings.decode, settings.limits, decode) as pool:
        decoded = pool.decode(videos(chain([first], pieces)))
        for result in decoded:
            piece = taken.popleft()
            results = chain([result], islice(decoded, len(piece.rows) - 1))
            work.finish(piece, _make_slice(piece, results, output, tokenizer, meta, settings.batch, work))


def _make_slice(
    piece: Slice,
    decoded: Iterator[DecodedClip | ClipError],
    output: PartialOutput,
    tokenizer: FrameTokenizer,
    meta: ShardMeta,
    batch: int,
    work: Work,
) -> SliceRecord:
    path = output.slice_path(piece.part, piece.index)
    failures: list[Failure] = []
    good: list[tuple[Row, float]] = []

    def good_clips() -> Iterator[NDArray[np.uint8]]:
        for row, result in zip(piece.rows, decoded, strict=True):
            if isinstance(result, ClipError):
                failures.append(Failure(row.line, printable(row.clip_id), printable(str(result))))
                work.count(0, 1, 0)
            else:
                good.append((row, result.fps))
                yield result.frames

    frames, seconds, clips = 0, 0.0, 0
    encoded = encode_in_batches(good_clips(), tokenizer, batch)
    first = next(encoded, None)
    if first is None:
        return SliceRecord(0, 0, 0.0, 0, "", failures)
    with ShardWriter(path, meta) as writer:
        for codes in chain([first], encoded):
            row, fps = good[clips]
            writer.add(row.clip_id, row.caption, codes, fps)
            work.count(1, 0, len(codes))
            clips += 1
            frames += len(codes)
            seconds += len(codes) / fps
    return SliceRecord(clips, frames, seconds, path.stat().st_size, sha256_file(path), failures)


def _all_failures(source: Source, slices: Sequence[Slice], output: PartialOutput) -> list[Failure]:
    failures = list(source.failures)
    for piece in slices:
        record = output.record(piece.part, piece.index)
        failures += record.failures if record is not None else []
    return sorted(failures, key=lambda failure: failure.line)


def summarize(stem: Path, manifest: dict[str, Any], start: float, earlier: bool) -> Summary:
    """Returns what a manifest says, after checking that the shards are there.

    Args:
        stem: of the output.
        manifest: of the output.
        start: `time.monotonic()` when the run started.
        earlier: an earlier run has made everything.

    Raises:
        DataError: a finished shard has gone or changed its size.
    """
    shards = manifest["shards"]
    for shard in shards:
        path = stem.parent / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["num_bytes"]:
            raise DataError(
                f"{path} is missing or not as {stem.name}.json says. Restore it, "
                "or prepare again with --overwrite."
            )
    failed = manifest["failed"]
    return Summary(
        shards=[stem.parent / shard["file"] for shard in shards],
        clips=sum(shard["clips"] for shard in shards),
        frames=sum(shard["frames"] for shard in shards),
        hours=sum(shard["seconds"] for shard in shards) / 3600,
        num_bytes=sum(shard["num_bytes"] for shard in shards),
        failed=failed,
        failed_path=stem.parent / "failed.jsonl" if failed else None,
        seconds=time.monotonic() - start,
        earlier=earlier,
    )
