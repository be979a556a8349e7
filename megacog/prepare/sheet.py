"""A picture of shards: clips decoded back from their codes, each under its caption."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megacog.data.shards import Shard
from megacog.errors import DataError
from megacog.prepare.inspect import ShardSet
from megacog.runtime.files import atomic_file

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont
    from PIL.Image import Image

    from megacog.tokenizers.frames import FrameTokenizer

_CELL_PIXELS = 96
_GAP = 4
_LINE_PIXELS = 18
_FONT_PIXELS = 13


def write_sheet(
    shards: ShardSet, tokenizer: FrameTokenizer, path: Path, clips: int = 8, frames: int = 8
) -> None:
    """Writes a contact sheet (PNG or what the name says).

    Args:
        shards: the set.
        tokenizer: the one that made the shards.
        path: picture to write.
        clips: rows; clips evenly spread over the set.
        frames: columns; frames evenly spread over each clip.

    Raises:
        DataError: another tokenizer made the shards, they are empty, or the name is of no picture format.
    """
    from PIL import Image

    shards.require_tokenizer(tokenizer)
    chosen = shards.spread(clips)
    if not chosen:
        raise DataError(f"{shards.shards[0].path}: there are no clips to draw")
    Image.init()
    picture_format = Image.registered_extensions().get(path.suffix.lower())
    if picture_format is None:
        raise DataError(
            f"{path}: {path.suffix or 'no suffix'!r} is no picture format; name the sheet like sheet.png"
        )
    strips = [(f"{shard.captions[clip]}", *_frames(shard, clip, tokenizer, frames)) for shard, clip in chosen]
    sheet = _draw(strips, frames)
    with atomic_file(path) as file:
        sheet.save(file, format=picture_format)


def _frames(shard: Shard, clip: int, tokenizer: FrameTokenizer, count: int) -> tuple[str, NDArray[np.uint8]]:
    """Returns a note on the clip and at most `count` frames [T, H, W, 3]."""
    import torch

    length, fps = int(shard.num_frames[clip]), float(shard.fps[clip])
    picks = np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int))
    codes = torch.from_numpy(shard.read(clip, picks).astype(np.int64))
    note = f"{length} frames at {fps:g} fps, {shard.clip_ids[clip]}"
    return note, tokenizer.decode(codes).cpu().numpy()


def _draw(strips: list[tuple[str, str, NDArray[np.uint8]]], columns: int) -> Image:
    from PIL import Image, ImageDraw, ImageFont

    height, width = strips[0][2].shape[1:3]
    scale = _CELL_PIXELS / height
    cell = (max(1, round(width * scale)), _CELL_PIXELS)
    band = 2 * _LINE_PIXELS + cell[1] + 2 * _GAP
    sheet = Image.new("RGB", (columns * (cell[0] + _GAP) + _GAP, len(strips) * band + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_PIXELS)
    for row, (caption, note, frames) in enumerate(strips):
        top = row * band + _GAP
        draw.text((_GAP, top), _shorten(draw, caption, sheet.width - 2 * _GAP, font), fill="black", font=font)
        small = _shorten(draw, note, sheet.width - 2 * _GAP, font)
        draw.text((_GAP, top + _LINE_PIXELS), small, fill="gray", font=font)
        for column, frame in enumerate(frames):
            picture = Image.fromarray(frame).resize(cell, Image.Resampling.NEAREST)
            sheet.paste(picture, (_GAP + column * (cell[0] + _GAP), top + 2 * _LINE_PIXELS))
    return sheet


def _shorten(
    draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    """Returns as much of the text as fits the width in pixels."""
    if draw.textlength(text, font=font) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high)
            if draw.textlength(text[:middle] + "...", font=font) <= width
            else (low, middle - 1)
        )
    return text[:low] + "..."
