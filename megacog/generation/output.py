"""Clips as files: mp4 (streamed), gif and contact sheet. Every file appears whole or not at all.

Tensor suffixes: T frames, H/W pixels, C channels (RGB).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from megacog.runtime.files import atomic_file
from megacog.runtime.log import get_logger

if TYPE_CHECKING:
    from PIL.Image import Image

# A clip of 32 pixels cannot be watched; small clips are enlarged to at least this side.
WATCHABLE_PIXELS = 128
# x264: visually lossless, so that blocking in a clip is the model's and not the encoder's; one thread, so that
# equal frames give equal files on every machine.
_ENCODER = {"crf": "15", "preset": "fast", "threads": "1"}
_MARGIN = 4
_CAPTION_PIXELS = 14
_logger = get_logger(__name__)


@lru_cache(maxsize=1)
def can_write_mp4() -> bool:
    """Whether PyAV is here. Where it is not, warns once: clips do without an mp4 then, rather than be lost."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        _logger.warning("no mp4 files will be written: PyAV cannot be imported (%s); pip install av", error)
        return False
    return True


def watchable_scale(height: int, width: int) -> int:
    """The smallest integer factor that brings the shorter side to at least 128 pixels."""
    return max(1, -(-WATCHABLE_PIXELS // min(height, width)))


def enlarge(frames_THWC: np.ndarray, scale: int) -> np.ndarray:
    """Every pixel repeated `scale` times on both axes: no new colors, no blur."""
    return frames_THWC if scale == 1 else frames_THWC.repeat(scale, axis=-3).repeat(scale, axis=-2)


class Mp4Stream:
    """An H.264 (yuv420p) video that grows frame by frame; an odd side is padded by repeating its last row."""

    def __init__(self, file: IO[bytes], fps: float, scale: int = 1) -> None:
        import av

        self._av = av
        self._scale = scale
        self._container = av.open(file, mode="w", format="mp4")
        rate = Fraction(fps).limit_denominator(1001)
        self._stream: Any = self._container.add_stream("libx264", rate=rate, options=dict(_ENCODER))
        self._stream.pix_fmt = "yuv420p"

    def append(self, frames_THWC: np.ndarray) -> None:
        """Encode frames, uint8 RGB, all of one size."""
        frames_THWC = enlarge(frames_THWC, self._scale)
        height, width = frames_THWC.shape[1:3]
        padding = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
        frames_THWC = np.pad(frames_THWC, padding, mode="edge")
        if not self._stream.codec_context.is_open:
            self._stream.height, self._stream.width = frames_THWC.shape[1:3]
        for frame_HWC in frames_THWC:
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Flush the encoder and write the index."""
        self._container.mux(self._stream.encode(None))
        self._container.close()


@contextmanager
def mp4_stream(path: Path | str, fps: float, scale: int = 1) -> Iterator[Mp4Stream]:
    """Yield a video that appears at `path` when the block ends without an error."""
    with atomic_file(path) as file:
        stream = Mp4Stream(file, fps, scale)
        yield stream
        stream.close()


def write_mp4(path: Path | str, frames_THWC: np.ndarray, fps: float, scale: int = 1) -> None:
    """Write frames, uint8 RGB, as an H.264 mp4, each pixel enlarged to `scale` x `scale`."""
    with mp4_stream(path, fps, scale) as stream:
        stream.append(frames_THWC)


def _image(frame_HWC: np.ndarray, scale: int) -> Image:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(enlarge(frame_HWC, scale)))


def write_gif(path: Path | str, frames_THWC: np.ndarray, fps: float, scale: int = 1) -> None:
    """Write frames, uint8 RGB, as an endless gif.

    Gif counts time in hundredths of a second; frame times are rounded so that the whole keeps its length.
    """
    ends_cs = np.rint(np.arange(1, len(frames_THWC) + 1) * 100 / fps).astype(int)
    durations_ms = [int(cs) * 10 for cs in np.diff(ends_cs, prepend=0)]
    images = [_image(frame_HWC, scale) for frame_HWC in frames_THWC]
    with atomic_file(path) as file:
        images[0].save(
            file, format="GIF", save_all=True, append_images=images[1:], duration=durations_ms, loop=0
        )


class FrameSample:
    """Evenly spaced frames of a clip of unknown length: every `stride`-th, at most `capacity`, in constant memory."""

    def __init__(self, capacity: int = 256) -> None:
        self.capacity = capacity
        self.stride = 1
        self._seen = 0
        self._frames: list[np.ndarray] = []

    def append(self, frames_THWC: np.ndarray) -> None:
        """Look at the next frames of the clip."""
        for frame_HWC in frames_THWC:
            if self._seen % self.stride == 0:
                if len(self._frames) == self.capacity:
                    self._frames = self._frames[::2]
                    self.stride *= 2
                if self._seen % self.stride == 0:
                    self._frames.append(frame_HWC.copy())
            self._seen += 1

    @property
    def frames_THWC(self) -> np.ndarray:
        """The sample, uint8 [T, H, W, C]."""
        return np.stack(self._frames)


@dataclass(frozen=True)
class Strip:
    """One clip of a contact sheet."""

    caption: str
    frames_THWC: np.ndarray


def spread(frames_THWC: np.ndarray, count: int) -> np.ndarray:
    """At most `count` frames, evenly spaced from the first to the last."""
    if len(frames_THWC) <= count:
        return frames_THWC
    return frames_THWC[np.linspace(0, len(frames_THWC) - 1, count).round().astype(int)]


def write_contact_sheet(path: Path | str, strips: Sequence[Strip], columns: int = 9, scale: int = 1) -> None:
    """Write a png with every strip's caption above its frames, `columns` frames to a line.

    Captions are drawn with Pillow's own font, which knows Latin letters; others come out as boxes.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not strips or any(len(strip.frames_THWC) == 0 for strip in strips):
        raise ValueError("a contact sheet needs strips with at least one frame each")
    height, width = (side * scale + _MARGIN for side in strips[0].frames_THWC.shape[1:3])
    columns = min(columns, max(len(strip.frames_THWC) for strip in strips))
    lines = [-(-len(strip.frames_THWC) // columns) for strip in strips]
    caption_height = _CAPTION_PIXELS + 2 * _MARGIN
    sheet_height = sum(caption_height + count * height for count in lines) + _MARGIN
    sheet = Image.new("RGB", (columns * width + _MARGIN, sheet_height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_CAPTION_PIXELS)
    top = 0
    for strip, count in zip(strips, lines, strict=True):
        draw.text((_MARGIN, top + _MARGIN), _drawable(strip.caption, font), fill="black", font=font)
        top += caption_height
        for index, frame_HWC in enumerate(strip.frames_THWC):
            row, column = divmod(index, columns)
            sheet.paste(_image(frame_HWC, scale), (_MARGIN + column * width, top + row * height))
        top += count * height
    with atomic_file(path) as file:
        sheet.save(file, format="PNG")


def _drawable(caption: str, font: object) -> str:
    """The caption, with what a bitmap font (Pillow without FreeType) cannot draw replaced."""
    from PIL import ImageFont

    one_line = " ".join(caption.split())
    if isinstance(font, ImageFont.ImageFont):
        return one_line.encode("latin-1", "replace").decode("latin-1")
    return one_line
