"""The frames that a frame tokenizer learns from: short runs of frames of many videos, in memory.

Dimensions: N frames of the pool, H/W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megacog.errors import DataError
from megacog.prepare.containers import ClipError
from megacog.prepare.decode import DecodeSettings
from megacog.prepare.workers import DecodePool, WorkerLimits
from megacog.runtime.log import get_logger
from megacog.runtime.progress import progress

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
# Reasons of failure that are shown one by one; the rest is counted.
_SHOWN_FAILURES = 5
_logger = get_logger(__name__)


@dataclass(frozen=True)
class PoolSettings:
    """Which frames are taken."""

    height: int = 32
    width: int = 32
    fps: float = 8.0
    """Rate at which videos are sampled, and folders of frames are taken to be."""
    max_videos: int = 1000
    """A larger collection is sampled down to this many videos."""
    frames_per_video: int = 32
    """Longer videos give one run of this many consecutive frames."""
    seed: int = 0
    workers: int = 2
    """Decoder processes."""


class FramePool:
    """Frames of many clips, with the neighbor in time of each."""

    def __init__(self, clips: Sequence[NDArray[np.uint8]]) -> None:
        """Takes clips uint8 [n, H, W, 3]."""
        self.frames_NHWC = torch.from_numpy(np.concatenate(clips))
        lengths = [len(clip) for clip in clips]
        self.first_frames = [0, *np.cumsum(lengths)[:-1].tolist()]
        # The frame after each; the last of a clip is paired with the one before, a lone one with itself.
        neighbors = [
            first + (k + 1 if k + 1 < length else max(k - 1, 0))
            for first, length in zip(self.first_frames, lengths, strict=True)
            for k in range(length)
        ]
        self.neighbor_N = torch.tensor(neighbors, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.frames_NHWC)

    def pairs(self, count: int, generator: torch.Generator) -> Tensor:
        """Returns uint8 [2 * count, H, W, 3]: random frames, then the neighbor of each."""
        chosen = torch.randint(len(self), (count,), generator=generator)
        return self.frames_NHWC[torch.cat([chosen, self.neighbor_N[chosen]])]


def list_videos(sources: Sequence[Path]) -> list[Path]:
    """Returns the videos, GIFs and folders of frames under the sources, sorted.

    Raises:
        DataError: a source is missing, or there is nothing in them.
    """
    found: set[Path] = set()
    for source in sources:
        if not source.exists():
            raise DataError(f"{source}: no such file or folder; name folders of videos, GIFs or frames")
        if source.is_dir():
            found |= _videos_under(source)
        elif source.suffix.lower() in VIDEO_SUFFIXES:
            found.add(source)
        else:
            raise DataError(f"{source}: not a video; known are {', '.join(VIDEO_SUFFIXES)} and folders of frames")
    if not found:
        raise DataError(
            f"{', '.join(map(str, sources))}: no videos found; known are {', '.join(VIDEO_SUFFIXES)} files and "
            f"folders of {', '.join(IMAGE_SUFFIXES)} frames"
        )
    return sorted(found)


def _videos_under(folder: Path) -> set[Path]:
    found = set()
    for path in folder.rglob("*"):
        suffix = path.suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            found.add(path)
        elif suffix in IMAGE_SUFFIXES:
            found.add(path.parent)
    return found


def split_heldout(videos: Sequence[Path], fraction: float) -> tuple[list[Path], list[Path]]:
    """Returns (training videos, held-out videos); a video's part depends on its path alone.

    At least one video is held out; a single video is in both parts.
    """
    if len(videos) == 1:
        return list(videos), list(videos)
    ranked = sorted(videos, key=lambda path: hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).digest())
    count = min(max(1, round(fraction * len(videos))), len(videos) - 1)
    heldout = set(ranked[:count])
    return [path for path in videos if path not in heldout], [path for path in videos if path in heldout]


def choose_videos(videos: Sequence[Path], settings: PoolSettings) -> list[Path]:
    """Returns at most `max_videos` of the videos, drawn by the seed, in their order."""
    if len(videos) <= settings.max_videos:
        return list(videos)
    rng = np.random.default_rng([settings.seed, len(videos)])
    chosen = rng.choice(len(videos), settings.max_videos, replace=False)
    return [videos[index] for index in sorted(chosen)]


def load_pool(videos: Sequence[Path], settings: PoolSettings, desc: str) -> FramePool:
    """Returns the frames of the videos; those that cannot be decoded are named and passed over.

    Raises:
        DataError: not one of them can be decoded.
    """
    decode_settings = DecodeSettings(
        fps=settings.fps,
        height=settings.height,
        width=settings.width,
        root="/",
        allow_absolute=True,
        folder_fps=settings.fps,
    )
    clips: list[NDArray[np.uint8]] = []
    failures: list[str] = []
    paths = [str(video.absolute()) for video in videos]
    with DecodePool(min(settings.workers, len(paths)), decode_settings, WorkerLimits()) as pool:
        for index, result in enumerate(progress(pool.decode(paths), len(paths), desc)):
            if isinstance(result, ClipError):
                failures.append(f"{videos[index]}: {result}")
            else:
                clips.append(_run_of_frames(result.frames, index, settings))
    for failure in failures[:_SHOWN_FAILURES]:
        _logger.warning("passed over %s", failure)
    if len(failures) > _SHOWN_FAILURES:
        _logger.warning("passed over %d more videos", len(failures) - _SHOWN_FAILURES)
    if not clips:
        raise DataError(f"none of {len(videos)} videos can be decoded; the first: {failures[0]}")
    return FramePool(clips)


def _run_of_frames(frames: NDArray[np.uint8], index: int, settings: PoolSettings) -> NDArray[np.uint8]:
    """Returns a copy of at most `frames_per_video` consecutive frames, from a place drawn by the seed."""
    spare = len(frames) - settings.frames_per_video
    first = int(np.random.default_rng([settings.seed, index]).integers(spare + 1)) if spare > 0 else 0
    return frames[first : first + settings.frames_per_video].copy()
