"""What a shard is called and what all its clips have in common."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from megacog.data.hdf5 import AGAIN
from megacog.errors import DataError

FORMAT = "megacog-frames"
VERSION = 1
MAX_ATTRIBUTE_BYTES = 16 << 10  # an object header holds 64 KiB; larger attributes move to a heap
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<total>\d{5})\.h5")


@dataclass(frozen=True)
class ShardMeta:
    """What all clips of a shard have in common.

    Attributes:
        grid: height and width of one frame in codes.
        codebook_size: codes are smaller than this.
        tokenizer_fingerprint: sha256 of the frame tokenizer that made the codes.
        decoder: name and version of the video decoder.
        settings: how the frames were made (JSON), for people and `inspect`.
        temporal_factor: frames per code frame; 1 = per-frame codes, so a lower rate is a stride.
    """

    grid: tuple[int, int]
    codebook_size: int
    tokenizer_fingerprint: str
    decoder: str
    settings: str
    temporal_factor: int = 1

    def __post_init__(self) -> None:
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid {self.grid} must be two positive numbers")
        if not 2 <= self.codebook_size <= 1 << 32:
            raise ValueError(f"codebook_size {self.codebook_size} must be between 2 and 2**32")
        if self.temporal_factor < 1:
            raise ValueError(f"temporal_factor {self.temporal_factor} must be positive")
        for name in ("tokenizer_fingerprint", "decoder", "settings"):
            size = len(getattr(self, name).encode())
            if not 1 <= size <= MAX_ATTRIBUTE_BYTES:
                raise ValueError(f"{name} has {size} bytes; a shard holds 1 to {MAX_ATTRIBUTE_BYTES}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Stored type of a code: little-endian uint16, or uint32 when the codebook needs it."""
        return np.dtype("<u2" if self.codebook_size <= 1 << 16 else "<u4")

    @property
    def frame_bytes(self) -> int:
        """Bytes of one stored frame."""
        return self.grid[0] * self.grid[1] * self.dtype.itemsize


def shard_path(stem: str | Path, index: int, total: int) -> Path:
    """Returns `<stem>-00000-of-00042.h5`."""
    if not 0 <= index < total:
        raise ValueError(f"shard index {index} is outside 0..{total - 1}")
    return Path(f"{stem}-{index:05d}-of-{total:05d}.h5")


def expand_shards(pattern: str | Path) -> list[Path]:
    """Returns the shard files that a path or glob pattern names, in name order.

    Raises:
        DataError: nothing matches, or a numbered set is incomplete.
    """
    text = os.path.expanduser(str(pattern))
    paths = [Path(text)] if Path(text).is_file() else [Path(name) for name in sorted(glob.glob(text))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(
            f"no shard matches {str(pattern)!r} (looked from {os.getcwd()}). Make shards with "
            "launch/prepare.py, or correct the path in data.train / data.eval."
        )
    found = set(paths)
    for path in paths:
        match = _SHARD_NAME.fullmatch(path.name)
        if match is None or len(paths) == 1:
            continue
        for index in range(int(match["total"])):
            sibling = shard_path(path.parent / match["stem"], index, int(match["total"]))
            if sibling not in found and fnmatch(str(sibling), text):
                raise DataError(
                    f"{sibling} is missing, though {path.name} says that the set has {int(match['total'])} "
                    "shards. Finish the preparation (launch/prepare.py continues where it stopped), or name "
                    "the wanted shards one by one."
                )
    return paths


class TextColumn(Sequence[str]):
    """Strings kept as UTF-8 bytes and offsets, decoded when asked for."""

    def __init__(self, data: NDArray[np.uint8], offsets: NDArray[np.int64], where: str) -> None:
        self._data, self._offsets, self._where = data, offsets, where

    @property
    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The bytes of all strings and where each one starts, and the last ends."""
        return self._data, self._offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        clip = range(len(self))[index]
        raw = self._data[self._offsets[clip] : self._offsets[clip + 1]].tobytes()
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self._where}: entry {clip} is not UTF-8 ({error}). {AGAIN}") from None
