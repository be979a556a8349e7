"""The demo corpus: handwritten digits that move, as real mp4 files with captions.

scikit-learn's 1797 scans (8x8, real handwriting) are drawn at sub-pixel positions along a straight
line, white on black, 32x32 pixels at 8 frames per second. The scans are split per digit into
`train` and `heldout` (both become videos) and `judge`, which only the evaluation's classifier sees.

A corpus folder holds train/ and heldout/, each with captions.csv (video, caption), metadata.jsonl
and the mp4 files, and digits.json with what was asked for; with --two-part also two-part/train/ and two-part/heldout/.

Dimensions: T frames, H/W pixels. Positions are (x, y) in pixels, y downwards; pixel i covers [i, i+1).
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megacog.errors import ConfigError, EnvError
from megacog.runtime.files import FolderKind, atomic_directory
from megacog.runtime.progress import progress

KIND = FolderKind("digits.json", "megacog-digits")
Split = Literal["train", "heldout", "judge"]
Scans = tuple[NDArray[np.float32], NDArray[np.int64]]

VECTORS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
DIRECTIONS = tuple(VECTORS)
TWO_PART_DIRECTIONS = tuple((first, then) for first in DIRECTIONS for then in DIRECTIONS if first != then)
SIZE = 32
"""Height and width of a frame in pixels."""
DIGIT_SIZE = 14
"""Height and width of the drawn scan: leaves 18 pixels to move, more than 4.1 s at the top speed."""
FPS = 8
SPEEDS = (3.0, 4.0)
"""Pixels per second, drawn independently of the length."""
SPEED_WEIGHTS = (0.25, 0.75)
FRAME_COUNTS = (10, 18, 34)
"""1.1, 2.1 and 4.1 seconds from the first to the last frame."""
FRAME_COUNT_WEIGHTS = (0.3, 0.3, 0.4)
TWO_PART_FRAME_COUNTS = (34,)
LONGEST_SECONDS = (max(FRAME_COUNTS) - 1) / FPS
# Shares of every digit's scans; the rest is the judge's.
TRAIN_SHARE, HELDOUT_SHARE = 0.5, 0.12
SPLIT_SEED = 1998
# Near-lossless at this size, so that compression does not limit the frame tokenizer.
CRF = 14


@dataclass(frozen=True)
class Motion:
    """How one clip moves."""

    directions: tuple[str, ...]
    """One direction, or two of equal duration."""
    speed: float
    """Pixels per second."""
    start: tuple[float, float]
    """Center of the digit in the first frame, (x, y) in pixels."""
    num_frames: int


@dataclass(frozen=True)
class Clip:
    """One clip of the corpus; everything that its pixels depend on."""

    digit: int
    scan_id: int
    """Index into scikit-learn's 1797 scans."""
    motion: Motion

    @property
    def caption(self) -> str:
        return caption(self.digit, self.motion.directions)


def caption(digit: int, directions: Sequence[str]) -> str:
    """Returns e.g. "the digit 3 moves right" or "the digit 3 moves right then down"."""
    return f"the digit {digit} moves {' then '.join(directions)}"


def captions() -> list[str]:
    """Returns the 40 captions of the demo, digit by digit."""
    return [caption(digit, (direction,)) for digit in range(10) for direction in DIRECTIONS]


@cache
def _dataset() -> Scans:
    """Returns all scans, float32 [1797, 8, 8] in 0..1, and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise EnvError(
            "the digits corpus is drawn from scikit-learn's scans, but scikit-learn is missing: "
            "pip install scikit-learn"
        ) from error
    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


@cache
def scan_ids(split: Split) -> tuple[int, ...]:
    """Returns the scans of a split as indices into scikit-learn's set; the same on every machine."""
    _, labels = _dataset()
    chosen: list[int] = []
    for digit in range(10):
        of_digit = np.flatnonzero(labels == digit)
        # RandomState's permutation is frozen by numpy's compatibility policy; default_rng's is not.
        of_digit = np.random.RandomState(SPLIT_SEED + digit).permutation(of_digit)
        num_train = round(TRAIN_SHARE * len(of_digit))
        num_heldout = round(HELDOUT_SHARE * len(of_digit))
        bounds = {
            "train": (0, num_train),
            "heldout": (num_train, num_train + num_heldout),
            "judge": (num_train + num_heldout, len(of_digit)),
        }
        if split not in bounds:
            raise ValueError(f"split must be one of {list(bounds)}, not {split!r}")
        chosen += of_digit[slice(*bounds[split])].tolist()
    return tuple(sorted(chosen))


def scans(split: Split) -> Scans:
    """Returns (images float32 [n, 8, 8] in 0..1, labels int64 [n]) of a split."""
    images, labels = _dataset()
    ids = np.array(scan_ids(split))
    return images[ids], labels[ids]


def sample_motion(
    rng: np.random.Generator,
    directions: Sequence[str] | None = None,
    num_frames: int | None = None,
    fps: float = FPS,
    size: int = SIZE,
) -> Motion:
    """Returns a random motion that keeps the digit inside the frame for the whole clip.

    A clip starts at the side opposite to its motion, in the middle across it: one place per direction, which
    makes the corpus learnable in minutes. At 8 frames per second digits still move by half and quarter pixels.

    Args:
        rng: source of everything that is not given.
        directions: one direction or two; None = one at random.
        num_frames: None = one of the corpus' lengths.
        fps: frames per second.
        size: height and width of the frame in pixels.
    """
    if directions is None:
        directions = (DIRECTIONS[rng.integers(len(DIRECTIONS))],)
    speed = float(rng.choice(SPEEDS, p=SPEED_WEIGHTS))
    if num_frames is None:
        num_frames = int(rng.choice(FRAME_COUNTS, p=FRAME_COUNT_WEIGHTS))
    seconds = max(LONGEST_SECONDS, (num_frames - 1) / fps)
    reach = speed * seconds / len(directions)
    start = tuple(_start([VECTORS[name][axis] for name in directions], reach, size) for axis in (0, 1))
    return Motion(tuple(directions), speed, (start[0], start[1]), num_frames)


def _start(steps: Sequence[float], reach: float, size: int) -> float:
    """Returns the first position on one axis: at the side that leaves most room, or the middle where none is needed."""
    lowest, highest = DIGIT_SIZE / 2, size - DIGIT_SIZE / 2
    offsets = np.cumsum([0.0, *(step * reach for step in steps)])
    low, high = lowest - float(offsets.min()), highest - float(offsets.max())
    if low > high:
        raise ValueError(f"a path of {np.ptp(offsets):.1f} pixels does not fit a frame of {size} pixels")
    if not offsets.any():
        return size / 2 - 1  # a whole number of codes from the border
    return lowest if offsets.max() > -offsets.min() else highest


def render_clip(
    scan: NDArray[np.floating[Any]],
    direction: str | Sequence[str],
    speed: float,
    start: tuple[float, float],
    num_frames: int,
    fps: float = FPS,
    size: int = SIZE,
) -> NDArray[np.uint8]:
    """Returns uint8 [T, size, size, 3]: the scan moving in a straight line at constant speed.

    Args:
        scan: ink in 0..1, [8, 8].
        direction: left, right, up or down; a sequence of directions shares the clip equally.
        speed: pixels per second.
        start: center of the digit in frame 0, (x, y) in pixels.
        num_frames: T.
        fps: frames per second.
        size: height and width of the frame in pixels.
    """
    directions = (direction,) if isinstance(direction, str) else tuple(direction)
    times_T = np.arange(num_frames) / fps
    part_seconds = max(num_frames - 1, 1) / fps / len(directions)
    centers_T2 = np.tile(np.asarray(start, dtype=np.float64), (num_frames, 1))
    for part, name in enumerate(directions):
        elapsed_T = np.clip(times_T - part * part_seconds, 0.0, part_seconds)
        centers_T2 += speed * elapsed_T[:, None] * np.asarray(VECTORS[name])
    return render_path(scan, centers_T2, size)


def render_path(
    scan: NDArray[np.floating[Any]], centers_T2: NDArray[np.float64], size: int = SIZE
) -> NDArray[np.uint8]:
    """Returns uint8 [T, size, size, 3]: the scan drawn with its center at each position (x, y)."""
    rows_THK = _pixel_weights(centers_T2[:, 1], len(scan), size)
    columns_TWK = _pixel_weights(centers_T2[:, 0], len(scan), size)
    ink_THW = rows_THK @ np.asarray(scan, dtype=np.float64) @ columns_TWK.transpose(0, 2, 1)
    # The rounding offset keeps results that differ in the last bit (BLAS) on the same gray level.
    gray_THW = np.floor(np.clip(ink_THW, 0.0, 1.0) * 255.0 + 0.5 - 1e-6).astype(np.uint8)
    return np.repeat(gray_THW[..., None], 3, axis=-1)


def _pixel_weights(centers_T: NDArray[np.float64], num_cells: int, size: int) -> NDArray[np.float64]:
    """Returns [T, size, num_cells]: how much each scan cell adds to each pixel.

    Bilinear upsampling, averaged over each pixel's area: point samples would make the ink swell and
    its center wobble with the sub-pixel position.
    """
    edges = np.arange(size + 1)
    scale = DIGIT_SIZE / num_cells
    in_cells = (edges - (centers_T[:, None] - DIGIT_SIZE / 2)) / scale - 0.5
    from_cell = np.clip(in_cells[:, :, None] - np.arange(num_cells), -1.0, 1.0)
    # Antiderivative of the tent 1 - |t|.
    area = 0.5 + from_cell - np.sign(from_cell) * from_cell**2 / 2
    return scale * np.diff(area, axis=1)


def corpus_clips(
    split: Split, num_clips: int, seed: int, two_part: bool = False, scans_per_digit: int | None = None
) -> Iterator[Clip]:
    """Yields the clips of a split; captions take turns, so every 40 (two-part: 120) clips hold each once.

    Clip i depends on (seed, split, i) and `scans_per_digit` only, not on the number of clips.

    Args:
        split: whose handwriting is drawn.
        num_clips: how many.
        seed: of everything random.
        two_part: captions with two motions.
        scans_per_digit: draw only this many scans of each digit; None = all of the split.
    """
    ids = np.array(scan_ids(split))
    _, labels = _dataset()
    motions = TWO_PART_DIRECTIONS if two_part else tuple((name,) for name in DIRECTIONS)
    for index in range(num_clips):
        rng = np.random.default_rng([seed, ["train", "heldout", "judge"].index(split), int(two_part), index])
        digit = index // len(motions) % 10
        of_digit = ids[labels[ids] == digit][:scans_per_digit]
        num_frames = int(rng.choice(TWO_PART_FRAME_COUNTS)) if two_part else None
        motion = sample_motion(rng, motions[index % len(motions)], num_frames)
        yield Clip(digit, int(of_digit[rng.integers(len(of_digit))]), motion)


def render(clip: Clip) -> NDArray[np.uint8]:
    """Returns the frames of a clip, uint8 [T, 32, 32, 3]."""
    images, _ = _dataset()
    motion = clip.motion
    return render_clip(images[clip.scan_id], motion.directions, motion.speed, motion.start, motion.num_frames)


def write_corpus(
    out: Path,
    num_clips: int,
    num_heldout: int,
    seed: int,
    two_part: bool,
    replace: bool,
    scans_per_digit: int | None = None,
) -> None:
    """Writes the whole corpus folder; it appears complete or not at all. `replace` replaces an older corpus.

    `scans_per_digit` limits the handwriting of the training clips; see `corpus_clips`.
    """
    sets: list[tuple[Split, int, bool]] = [("train", num_clips, False), ("heldout", num_heldout, False)]
    if two_part:
        sets += [("train", num_clips, True), ("heldout", num_heldout, True)]
    with atomic_directory(out, KIND if replace else None) as folder:
        made = {"format": KIND.format, "clips": num_clips, "heldout_clips": num_heldout, "seed": seed}
        made |= {"two_part": two_part, "scans_per_digit": scans_per_digit}
        (folder / KIND.file).write_text(json.dumps(made) + "\n", encoding="utf-8")
        for split, count, is_two_part in sets:
            name = f"two-part/{split}" if is_two_part else split
            limit = scans_per_digit if split == "train" else None
            clips = corpus_clips(split, count, seed, is_two_part, limit)
            _write_split(folder / name, clips, count, f"drawing {name}")


def _write_split(folder: Path, clips: Iterator[Clip], num_clips: int, desc: str) -> None:
    folder.mkdir(parents=True)
    with (
        open(folder / "captions.csv", "w", encoding="utf-8", newline="") as table,
        open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata,
    ):
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["video", "caption"])
        for index, clip in enumerate(progress(clips, num_clips, desc)):
            # Clip ids are file names, and no id may stand in two splits.
            name = f"{folder.name}-{index:06d}.mp4"
            _write_mp4(folder / name, render(clip))
            rows.writerow([name, clip.caption])
            motion = clip.motion
            record = {
                "video": name,
                "caption": clip.caption,
                "digit": clip.digit,
                "directions": motion.directions,
                "speed": motion.speed,
                "scan": clip.scan_id,
                "start": [round(position, 4) for position in motion.start],
                "num_frames": motion.num_frames,
                "fps": FPS,
            }
            metadata.write(json.dumps(record) + "\n")


def _write_mp4(path: Path, frames_THWC: NDArray[np.uint8]) -> None:
    import av

    # Encoded by hand, not through generation/output.py: prepare is the floor below.
    with av.open(str(path), "w") as container:
        # One encoder thread: as fast at this size, and the same bytes on every machine.
        stream = container.add_stream(
            "libx264", rate=FPS, options={"crf": str(CRF), "preset": "veryfast", "threads": "1"}
        )
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `prepare.py digits` and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="prepare.py digits",
        description="Write the demo corpus: moving handwritten digits with captions.",
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--clips", type=int, default=1500, help="training clips (default: %(default)s)")
    parser.add_argument(
        "--heldout-clips", type=int, default=200, help="clips of held-out handwriting (default: %(default)s)"
    )
    parser.add_argument(
        "--scans-per-digit",
        type=int,
        metavar="N",
        help="training clips show N different scans of each digit; fewer are learned sooner (default: all 90)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--two-part", action="store_true", help='also "the digit 3 moves right then down"')
    parser.add_argument("--force", action="store_true", help="replace an existing corpus")
    settings = parser.parse_args(argv)
    for name in ("clips", "heldout_clips", "scans_per_digit"):
        if getattr(settings, name) is not None and getattr(settings, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(settings, name)}")
    if settings.seed < 0:
        raise ConfigError(f"--seed must not be negative, not {settings.seed}")
    write_corpus(
        settings.out,
        settings.clips,
        settings.heldout_clips,
        settings.seed,
        settings.two_part,
        settings.force,
        settings.scans_per_digit,
    )
    print(f"{settings.clips} training and {settings.heldout_clips} held-out clips in {settings.out}")
    return 0
