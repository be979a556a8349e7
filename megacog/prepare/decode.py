"""Decoding one video, GIF, image or folder of frames to RGB frames at a chosen rate and size. Files inside tars are
read from their place there.

Runs in the child processes of `megacog.prepare.workers`, because decoders hang and crash. PyAV and
Pillow are imported inside functions: the parent and `--help` do without them.

Shapes: T frames, H and W pixels of a stored frame.
"""

from __future__ import annotations

import io
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from megacog.prepare.containers import ClipError, container_format
from megacog.prepare.tar import Member, TarWindow

if TYPE_CHECKING:
    import av
    from PIL.Image import Image

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_RATE_TOLERANCE = 0.01
_CONTAINER_TICKS = 1_000_000
_LEAST_SHARE = 0.9
Frame = TypeVar("Frame")


@dataclass(frozen=True)
class DecodeSettings:
    """How clips become frames.

    Attributes:
        fps: rate of the stored frames in frames per second; slower sources keep their own rate.
        height: pixels of a stored frame.
        width: pixels of a stored frame.
        root: folder that relative paths start from and must not leave.
        allow_absolute: absolute paths (and links that leave `root`) are allowed.
        folder_fps: rate of folders of frames; None = they are refused.
        max_frames: a clip with more stored frames is refused.
        max_pixels: a source frame with more pixels is refused.
    """

    fps: float
    height: int
    width: int
    root: str
    allow_absolute: bool = False
    folder_fps: float | None = None
    max_frames: int = 2048
    max_pixels: int = 1 << 25


@dataclass(frozen=True)
class DecodedClip:
    """Frames uint8 [T, H, W, 3] and the rate at which they were sampled, in frames per second."""

    frames: NDArray[np.uint8]
    fps: float


@dataclass(frozen=True)
class _Media:
    """A file, or a member of the tar that this file is."""

    path: Path
    member: Member | None = None

    @property
    def name(self) -> str:
        return self.path.name if self.member is None else self.member.name

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix.lower()

    def open(self) -> BinaryIO:
        """Returns the file, or a window on the tar that ends where the member does."""
        if self.member is None:
            return open(self.path, "rb")
        return io.BufferedReader(TarWindow(self.path, self.member.offset, self.member.size))


def decoder_name() -> str:
    """Returns name and version of everything that decides what a decoded pixel is."""
    import av
    import PIL

    codec, scale = (".".join(map(str, av.library_versions[name])) for name in ("libavcodec", "libswscale"))
    return f"PyAV {av.__version__}, libavcodec {codec}, libswscale {scale}, Pillow {PIL.__version__}"


def decode_clip(video: str, settings: DecodeSettings) -> DecodedClip:
    """Returns the frames of a video, GIF, image or folder of images.

    Args:
        video: path relative to `settings.root`, or absolute; or `str` of a `Member` of a tar there.
        settings: rate, size and limits.

    Raises:
        ClipError: the clip cannot be used; the message says why.
    """
    member = Member.parse(video) if Member.names(video) else None
    media = _Media(_locate(member.tar if member else video, settings), member)
    if member is not None and member.offset + member.size > media.path.stat().st_size:
        raise ClipError(f"{member.tar} is shorter than it was when its headers were read")
    if media.path.is_dir():
        return _decode_folder(media.path, settings)
    if media.suffix in _IMAGE_SUFFIXES:
        return DecodedClip(_load_images([media], settings), settings.fps)
    return _decode_video(media, settings)


def sample_times(first: float, last: float, count: int, source_fps: float, fps: float) -> list[float]:
    """Returns the times, in seconds, at which a source is sampled: `first + k / rate`.

    Args:
        first: time of the first source frame in seconds.
        last: time of the last source frame in seconds.
        count: source frames.
        source_fps: rate of the source; the sampling rate is min(fps, source_fps).
        fps: wanted rate.
    """
    if count == 1:
        return [first]
    rate = min(fps, source_fps)
    # Half a source frame of slack: time stamps are rounded to milliseconds, in GIF to centiseconds.
    num = int((last - first + 0.5 / source_fps) * rate) + 1
    return [first + k / rate for k in range(num)]


def nearest_frames(frames: Iterable[tuple[float, Frame]], times: Sequence[float]) -> Iterator[Frame]:
    """Yields, for each of the ascending times, the frame whose time is nearest (the earlier of two).

    Takes no more frames than it needs; frames that step back in time are passed over.
    """
    k = 0
    previous: tuple[float, Frame] | None = None
    for time, frame in frames:
        if previous is not None:
            if time <= previous[0]:
                continue
            while k < len(times) and times[k] <= (previous[0] + time) / 2:
                yield previous[1]
                k += 1
        if k == len(times):
            return
        previous = (time, frame)
    if previous is not None:
        for _ in range(k, len(times)):
            yield previous[1]


def center_box(
    width: int, height: int, out_width: int, out_height: int, pixel_aspect: float = 1.0
) -> tuple[float, float, float, float]:
    """Returns the largest centered box (left, top, right, bottom) of a frame with the output's shape.

    Args:
        width: source frame, in stored pixels.
        height: source frame, in stored pixels.
        out_width: wanted frame.
        out_height: wanted frame.
        pixel_aspect: shown width / height of a source pixel.
    """
    shown_width = width * pixel_aspect
    box_width = min(shown_width, height * out_width / out_height) / pixel_aspect
    box_height = min(float(height), shown_width * out_height / out_width)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return (left, top, left + box_width, top + box_height)


def _locate(video: str, settings: DecodeSettings) -> Path:
    root = Path(settings.root).resolve()
    try:
        path = (root / video).resolve()
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ClipError(f"no such file (looked for {root / video})") from None
    except (OSError, RuntimeError) as error:
        raise ClipError(f"cannot be opened: {error}") from None
    if not settings.allow_absolute:
        _check_inside(path, root)
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ClipError("neither a regular file nor a folder")
    return path


def _check_inside(path: Path, root: Path) -> None:
    if not path.is_relative_to(root):
        raise ClipError(f"leads out of {root} to {path}; pass --allow-absolute if that is meant")


def _check_length(num_frames: int, settings: DecodeSettings) -> None:
    if num_frames > settings.max_frames:
        raise ClipError(
            f"{num_frames} frames at {settings.fps:g} fps, more than --max-frames {settings.max_frames}"
        )


def _check_pixels(width: int, height: int, settings: DecodeSettings) -> None:
    if width * height > settings.max_pixels:
        raise ClipError(f"frames of {width}x{height} exceed --max-pixels {settings.max_pixels}")


def _decode_video(media: _Media, settings: DecodeSettings) -> DecodedClip:
    import av

    with media.open() as file:
        demuxer = container_format(file)
    try:
        first, last, count, source_fps = _scan(media, demuxer, settings)
        times = sample_times(first, last, count, source_fps, settings.fps)
        _check_length(len(times), settings)
        frames = np.stack([*_sample_video(media, demuxer, times, settings)])
    except MemoryError:
        raise
    # PyAV raises ValueError, OSError, EOFError, IndexError and their FFmpeg subclasses for broken streams.
    except (av.error.FFmpegError, OSError, ValueError, EOFError, LookupError) as error:
        raise ClipError(f"cannot be decoded: {error}") from None
    return DecodedClip(frames, min(settings.fps, source_fps) if count > 1 else settings.fps)


@contextmanager
def _open(media: _Media, demuxer: str) -> Iterator[av.container.InputContainer]:
    import av

    options = {"protocol_whitelist": "file"}
    if media.member is None:
        with av.open(str(media.path), format=demuxer, options=options, metadata_errors="replace") as container:
            yield container
    else:
        with (
            media.open() as file,
            av.open(file, format=demuxer, options=options, metadata_errors="replace") as container,
        ):
            yield container


def _video_stream(container: av.container.InputContainer, settings: DecodeSettings) -> av.VideoStream:
    streams = container.streams.video
    if not streams:
        raise ClipError("holds no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise ClipError("its video codec is unknown")
    _check_pixels(stream.width, stream.height, settings)
    # One thread: the processes are the parallelism, and memory and results do not depend on the machine.
    stream.thread_type = "NONE"
    stream.codec_context.options = {"max_pixels": str(settings.max_pixels), "threads": "1"}
    return stream


def _scan(media: _Media, demuxer: str, settings: DecodeSettings) -> tuple[float, float, int, float]:
    """Returns first and last time (s), number and rate (fps) of the source's frames, without decoding."""
    with _open(media, demuxer) as container:
        stream = _video_stream(container, settings)
        ticks = [
            packet.pts if packet.pts is not None else packet.dts
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard
        ]
        stamps = [tick for tick in ticks if tick is not None]
        if not stamps:
            raise ClipError("holds no video frames" if not ticks else "its frames carry no time stamps")
        assert stream.time_base is not None
        first, last = float(min(stamps) * stream.time_base), float(max(stamps) * stream.time_base)
        declared = float(stream.average_rate or 0)
        if demuxer == "matroska":
            _check_declared_length(container, stream, last)
    if last <= first:
        return first, first, 1, settings.fps
    measured = (len(stamps) - 1) / (last - first)
    close = abs(declared - measured) <= _RATE_TOLERANCE * measured
    # The declared rate is exact where time stamps are rounded.
    return first, last, len(stamps), declared if close else measured


def _check_declared_length(
    container: av.container.InputContainer, stream: av.VideoStream, last: float
) -> None:
    """Matroska has no index of frames: behind a damaged place the rest of the file may just be missing."""
    seconds = 0.0
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        seconds = int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
    elif len(container.streams) == 1 and container.duration:
        seconds = container.duration / _CONTAINER_TICKS
    if last < _LEAST_SHARE * seconds - 1 / float(stream.average_rate or 1):
        raise ClipError(f"truncated or damaged: its frames end at {last:.2f} s of {seconds:.2f} s")


def _sample_video(
    media: _Media, demuxer: str, times: Sequence[float], settings: DecodeSettings
) -> Iterator[NDArray[np.uint8]]:
    """Yields one stored frame [H, W, 3] for each of the times."""
    with _open(media, demuxer) as container:
        stream = _video_stream(container, settings)
        stamped = ((frame.time, frame) for frame in container.decode(stream) if frame.time is not None)
        shown: av.VideoFrame | None = None
        for frame in nearest_frames(stamped, times):
            if frame is not shown:
                shown, pixels = frame, _fit_frame(frame, stream, settings)
            yield pixels
        if shown is None:
            raise ClipError("none of its frames can be decoded")
        # Frames at the end that cannot be decoded would otherwise be stood for by the last good one.
        if times[-1] - (shown.time or 0.0) > 2 / float(stream.average_rate or 1):
            raise ClipError(f"damaged: decoding ends at {shown.time:.2f} s of {times[-1]:.2f} s")


def _fit_frame(frame: av.VideoFrame, stream: av.VideoStream, settings: DecodeSettings) -> NDArray[np.uint8]:
    from PIL import Image

    if frame.is_corrupt:
        raise ClipError(f"the frame at {frame.time:.3f} s is damaged")
    # A stream may change its size on the way.
    _check_pixels(frame.width, frame.height, settings)
    aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    pixels = frame.to_ndarray(format="rgb24", threads=1)
    if turns := round(frame.rotation / 90) % 4:
        pixels = np.ascontiguousarray(np.rot90(pixels, turns))
        aspect = 1 / aspect if turns % 2 else aspect
    return _fit_image(Image.fromarray(pixels), settings, aspect)


def _fit_image(image: Image, settings: DecodeSettings, pixel_aspect: float = 1.0) -> NDArray[np.uint8]:
    """Returns the image scaled (antialiased) and center-cropped to the stored size, [H, W, 3]."""
    from PIL import Image as pil

    box = center_box(image.width, image.height, settings.width, settings.height, pixel_aspect)
    return np.asarray(image.resize((settings.width, settings.height), pil.Resampling.BICUBIC, box=box))


def _decode_folder(path: Path, settings: DecodeSettings) -> DecodedClip:
    if settings.folder_fps is None:
        raise ClipError(
            "a folder of frames needs --folder-fps: the rate at which its frames follow each other"
        )
    # A leading dot: the companion files that macOS leaves beside pictures.
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    images = sorted(
        (entry for entry in entries if entry.suffix.lower() in _IMAGE_SUFFIXES), key=_natural_order
    )
    if not images:
        raise ClipError("the folder holds no .png, .jpg or .jpeg frames")
    if not settings.allow_absolute:
        for image in images:
            _check_inside(image.resolve(), Path(settings.root).resolve())
    rate = settings.folder_fps
    times = sample_times(0.0, (len(images) - 1) / rate, len(images), rate, settings.fps)
    _check_length(len(times), settings)
    chosen = list(nearest_frames(((k / rate, image) for k, image in enumerate(images)), times))
    return DecodedClip(_load_images([_Media(path) for path in chosen], settings), min(rate, settings.fps))


def _natural_order(path: Path) -> list[tuple[int, int, str]]:
    """Sort key that puts frame2 before frame10; the name itself decides between 2 and 02."""
    parts = re.split(r"(\d+)", path.name, flags=re.ASCII)
    key = [(0, int(part), "") if part.isdecimal() and part.isascii() else (1, 0, part) for part in parts]
    return [*key, (2, 0, path.name)]


def _load_images(files: Sequence[_Media], settings: DecodeSettings) -> NDArray[np.uint8]:
    """Returns the images as frames [T, H, W, 3]."""
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None
    frames = []
    for media in files:
        try:
            with media.open() as file, Image.open(file, formats=("PNG", "JPEG")) as image:
                _check_pixels(*image.size, settings)
                # Phones store how the picture is to be turned.
                upright = ImageOps.exif_transpose(image)
                frames.append(_fit_image(upright.convert("RGB"), settings))
        except (OSError, ValueError, SyntaxError) as error:
            raise ClipError(f"{media.name}: not a readable png or jpg image: {error}") from None
    return np.stack(frames)
