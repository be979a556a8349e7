"""`prepare.py merge`: the clips of several sets of shards as one set, or of one set in another number of shards.

Clips keep their codes, captions, rates, ids and token ids bit for bit, and their order: set after set as named, each
in the order in which training numbers its clips. Nothing is decoded or coded again.
"""

from __future__ import annotations

import hashlib
import json
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacog.data.shard_format import MAX_ATTRIBUTE_BYTES
from megacog.data.shards import Shard, ShardMeta, ShardWriter, expand_shards
from megacog.errors import ConfigError, DataError
from megacog.prepare.inspect import parsed_settings
from megacog.prepare.meter import Meter
from megacog.prepare.pipeline import Summary, summarize
from megacog.prepare.sources import Failure
from megacog.prepare.state import Part, PartialOutput, SliceRecord, finished_shards, produce
from megacog.runtime.files import require_space, sha256_file

_MUST_AGREE = ("tokenizer_fingerprint", "grid", "codebook_size", "temporal_factor")
_NOTES = ("decoder", "settings")


@dataclass(frozen=True)
class MergeSettings:
    """What `merge` is to do.

    Attributes:
        out: folder and stem of the new shards.
        clips_per_shard: clips of every shard but the last.
        num_shards: shards to make, as equal as can be, whatever `clips_per_shard` says.
        mixed_settings: sets that were prepared in different ways (rate, size, decoder) may be merged.
        overwrite: remove what an earlier run left under the stem first.
    """

    out: Path
    clips_per_shard: int = 1000
    num_shards: int | None = None
    mixed_settings: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class _Inputs:
    """The shards to be merged, none of them open.

    Attributes:
        paths: in order.
        starts: number of each one's first clip, and of all clips.
        meta: of the new shards.
        text_tokenizer: of the stored token ids, or None.
        sha256: of everything in them.
        num_bytes: of their files.
    """

    paths: list[Path]
    starts: list[int]
    meta: ShardMeta
    text_tokenizer: str | None
    sha256: str
    num_bytes: int

    @property
    def num_clips(self) -> int:
        return self.starts[-1]


def merge(patterns: Sequence[str], settings: MergeSettings) -> Summary:
    """Makes the new shards, or finishes making them, and returns what was made.

    Every frame is compared with its checksum when it is read and again when its new shard is complete.

    Args:
        patterns: shard files or globs; in this order.
        settings: everything else.

    Raises:
        ConfigError: the output belongs to a run with other settings or is one of the inputs.
        DataError: a shard is missing or damaged, the sets do not go together, or a clip is in two of them.
        EnvError: no disk space.
    """
    start = time.monotonic()
    inputs = _survey(list(dict.fromkeys(path for each in patterns for path in expand_shards(each))), settings)
    bounds = _bounds(inputs.num_clips, settings)
    part = Part(settings.out, len(bounds) - 1)

    def make(output: PartialOutput) -> list[Failure]:
        todo = [index for index in range(part.num_slices) if output.record(part, index) is None]
        left = sum(bounds[index + 1] - bounds[index] for index in todo)
        require_space(output.folder, inputs.num_bytes * left // inputs.num_clips)
        with Meter(inputs.num_clips, inputs.num_clips - left) as meter:
            for index in todo:
                clips = range(bounds[index], bounds[index + 1])
                record = _make_shard(inputs, clips, output.slice_path(part, index), meter)
                output.finish_slice(part, index, record)
        return []

    recorded = {
        "merged_clips": inputs.num_clips,
        "merged_sha256": inputs.sha256,
        "shards": len(bounds) - 1,
        "clips_of_the_first": bounds[1],
        "frame_tokenizer": inputs.meta.tokenizer_fingerprint,
    }
    manifest, earlier = produce(settings.out, recorded, [part], make, overwrite=settings.overwrite)
    return summarize(settings.out, manifest, start, earlier)


def _survey(paths: Sequence[Path], settings: MergeSettings) -> _Inputs:
    """Returns what is in the inputs after checking that they go together; opens one at a time."""
    _refuse_own_output(paths, settings.out)
    first: Shard | None = None
    notes: dict[str, dict[str, Path]] = {name: {} for name in _NOTES}
    starts, num_bytes, digest = [0], 0, hashlib.sha256()
    id_hashes = []
    for path in paths:
        with Shard(path) as shard:
            first = first or shard
            _require_agreement(first, shard)
            for name, seen in notes.items():
                seen.setdefault(getattr(shard.meta, name), path)
            id_hashes.append(np.fromiter(map(_hash64, shard.clip_ids), np.uint64, shard.num_clips))
            digest.update(bytes.fromhex(shard.digest()))
            starts.append(starts[-1] + shard.num_clips)
            num_bytes += path.stat().st_size
    assert first is not None
    if not starts[-1]:
        raise DataError(f"{paths[0]} and the others hold no clips; there is nothing to merge.")
    if not settings.mixed_settings:
        for name, seen in notes.items():
            _refuse_different(name, seen)
    _refuse_repeated(paths, np.concatenate(id_hashes))
    meta = ShardMeta(
        first.meta.grid,
        first.meta.codebook_size,
        first.meta.tokenizer_fingerprint,
        "; ".join(notes["decoder"]),
        _joined(list(notes["settings"])),
        first.meta.temporal_factor,
    )
    return _Inputs(list(paths), starts, meta, first.text_tokenizer, digest.hexdigest(), num_bytes)


def _refuse_own_output(paths: Sequence[Path], out: Path) -> None:
    partial = PartialOutput(out).folder
    own = {path.resolve() for path in finished_shards([out])}
    for path in paths:
        if path.resolve() in own or partial.resolve() in path.resolve().parents:
            raise ConfigError(f"{path} is read and would be replaced: choose another --out than {out}, then remove it.")


def _require_agreement(first: Shard, shard: Shard) -> None:
    ours = {name: getattr(first.meta, name) for name in _MUST_AGREE} | {"text_tokenizer": first.text_tokenizer}
    theirs = {name: getattr(shard.meta, name) for name in _MUST_AGREE} | {"text_tokenizer": shard.text_tokenizer}
    for name, value in ours.items():
        if theirs[name] != value:
            raise DataError(
                f"{shard.path} has {name} {theirs[name]}, {first.path} has {value}. Only shards that agree can be "
                "merged; train on the others as further entries of data.train if they fit the model."
            )


def _refuse_different(name: str, seen: dict[str, Path]) -> None:
    if len(seen) > 1:
        (one, path), (other, other_path) = list(seen.items())[:2]
        raise DataError(
            f"{other_path} was prepared with {name} {other}, {path} with {one}. Pass --mixed-settings if they are to "
            "be merged all the same; every clip keeps its own rate."
        )


def _joined(settings: Sequence[str]) -> str:
    """Returns the settings of all sets as one JSON text."""
    if len(settings) == 1:
        return settings[0]
    joined = json.dumps({"merged": [parsed_settings(each) for each in settings]})
    if len(joined) > MAX_ATTRIBUTE_BYTES:
        raise DataError(f"the shards were prepared in {len(settings)} different ways, too many to note in one shard.")
    return joined


def _hash64(clip_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(clip_id.encode(), digest_size=8).digest(), "little")


def _refuse_repeated(paths: Sequence[Path], hashes: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
    """Raises DataError if a clip is in two shards. The ids of millions take no memory, their hashes 8 bytes each."""
    values, counts = np.unique(hashes, return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    seen: dict[str, Path] = {}
    repeated: list[tuple[str, Path, Path]] = []
    for path in paths:
        with Shard(path) as shard:
            for clip_id in shard.clip_ids:
                if _hash64(clip_id) in suspects and seen.setdefault(clip_id, path) != path:
                    repeated.append((clip_id, seen[clip_id], path))
    if repeated:
        clip_id, one, other = repeated[0]
        raise DataError(
            f"{len(repeated)} clip(s) are in two shards, e.g. {clip_id!r} in {one} and {other}. Leave one of the sets "
            "out, or prepare them from one root folder, so that different videos have different ids."
        )


def _bounds(num_clips: int, settings: MergeSettings) -> list[int]:
    """Returns the number of the first clip of every new shard, and of all clips."""
    if settings.num_shards is not None:
        if settings.num_shards > num_clips:
            raise ConfigError(f"--shards {settings.num_shards}: there are only {num_clips} clips")
        return [index * num_clips // settings.num_shards for index in range(settings.num_shards + 1)]
    return [*range(0, num_clips, settings.clips_per_shard), num_clips]


def _make_shard(inputs: _Inputs, clips: range, path: Path, meter: Meter) -> SliceRecord:
    frames, seconds = 0, 0.0
    shard: Shard | None = None
    place = -1
    with ShardWriter(path, inputs.meta, inputs.text_tokenizer) as writer:
        for clip in clips:
            wanted = bisect_right(inputs.starts, clip) - 1
            if shard is None or wanted != place:
                if shard is not None:
                    shard.close()
                shard, place = Shard(inputs.paths[wanted]), wanted
            local = clip - inputs.starts[place]
            codes = shard.read(local, slice(None))
            tokens = None if inputs.text_tokenizer is None else shard.token_ids(local).tolist()
            fps = float(shard.fps[local])
            writer.add(shard.clip_ids[local], shard.captions[local], codes, fps, tokens)
            frames, seconds = frames + len(codes), seconds + len(codes) / fps
            meter.count(len(codes))
    if shard is not None:
        shard.close()
    return SliceRecord(len(clips), frames, seconds, path.stat().st_size, sha256_file(path), [])
