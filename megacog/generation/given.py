"""Image and video prompts as codes of the first key frames.

Files are decoded as the training videos are: in a child process with limits on time and memory,
scaled to cover the frame and cut to its middle.

Tensor suffixes: K key frames, P cells of a frame.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from megacog.errors import DataError
from megacog.prepare.containers import ClipError
from megacog.prepare.decode import DecodeSettings
from megacog.prepare.workers import DecodePool, WorkerLimits
from megacog.tokenizers.frames import FrameTokenizer

_RATE_TOLERANCE = 0.02


def given_codes(path: Path, grid: tuple[int, int], tokenizer: FrameTokenizer, key_rate: float, most: int) -> Tensor:
    """Codes of an image, or of a video sampled at the key frame rate from its start: int64 [K, P], K <= most.

    Args:
        path: png, jpg, mp4, mov, mkv, webm or gif.
        grid: height and width of a frame in codes.
        tokenizer: the model's frame tokenizer.
        key_rate: key frames per second.
        most: frames that are taken at most; later ones of a longer video are not used.

    Raises:
        DataError: the file cannot be decoded, or its rate is below the key frame rate.
    """
    height, width = (side * tokenizer.downsample for side in grid)
    settings = DecodeSettings(key_rate, height, width, str(path.parent), allow_absolute=True)
    with DecodePool(1, settings, WorkerLimits()) as pool:
        (clip,) = pool.decode([path.name])
    if isinstance(clip, ClipError):
        raise DataError(f"{path}: {clip}")
    if len(clip.frames) > 1 and not math.isclose(clip.fps, key_rate, rel_tol=_RATE_TOLERANCE):
        raise DataError(
            f"{path} has {clip.fps:g} frames per second, fewer than the {key_rate:g} key frames per second "
            'that the clip is made of; ask for a longer span (generation.seconds) or larger "seconds"'
        )
    codes_Khw = tokenizer.encode(torch.from_numpy(clip.frames[:most].copy()))
    return codes_Khw.flatten(1).cpu().clone()
