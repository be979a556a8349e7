"""Checking shards: every byte of each, and that they go together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megacog.data.shards import Shard, expand_shards
from megacog.errors import DataError


@dataclass
class Verification:
    """What was checked and what is wrong.

    Attributes:
        shards: files that were found.
        clips: clips of the readable ones.
        frames: frames of the readable ones.
        failures: one sentence per fault.
    """

    shards: list[Path] = field(default_factory=list)
    clips: int = 0
    frames: int = 0
    failures: list[str] = field(default_factory=list)


def verify(patterns: Sequence[str]) -> Verification:
    """Returns what is wrong with the shards that paths or glob patterns name; reads all of them."""
    result = Verification()
    for pattern in patterns:
        try:
            result.shards += [path for path in expand_shards(pattern) if path not in result.shards]
        except DataError as error:
            result.failures.append(str(error))
    first_seen: dict[str, Path] = {}
    kinds: dict[tuple[object, ...], Path] = {}
    for path in result.shards:
        try:
            with Shard(path) as shard:
                shard.verify()
                result.clips += shard.num_clips
                result.frames += int(shard.num_frames.sum())
                result.failures += _repeated(path, shard.clip_ids, first_seen)
                meta = shard.meta
                kinds.setdefault((meta.tokenizer_fingerprint, meta.codebook_size, meta.grid), path)
        except DataError as error:
            result.failures.append(str(error))
    if len(kinds) > 1:
        names = ", ".join(str(path) for path in kinds.values())
        result.failures.append(
            f"{names}: made with different frame tokenizers or grids; they cannot be used together"
        )
    return result


def _repeated(path: Path, clip_ids: Iterable[str], first_seen: dict[str, Path]) -> list[str]:
    """Returns a sentence if clips of this shard are in an earlier one too, and remembers its ids."""
    repeated = [clip_id for clip_id in clip_ids if first_seen.setdefault(clip_id, path) != path]
    if not repeated:
        return []
    return [f"{path}: {len(repeated)} clips are in {first_seen[repeated[0]]} too, e.g. {repeated[0]!r}"]
