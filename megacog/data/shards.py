"""HDF5 shards of pretokenized clips: writer and reader.

A shard holds the frames of many clips in one contiguous array and a few small arrays that say where
each clip lies. Every byte is covered by a checksum: frames by `/frames_crc32` (checked at every
read), small arrays by their `crc32` attribute, everything else by HDF5's own metadata checksums
(`libver="latest"`). HDF5 is opened once for the small arrays; frames are read with `pread` from the
contiguous extent, which costs no HDF5 call and is safe after fork.

Shapes: N frames of the shard, V clips, h and w codes of one frame.
"""

from __future__ import annotations

import glob
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import IO, Any, overload

import h5py
import numpy as np
from numpy.typing import NDArray

from megacog.data import hdf5
from megacog.data.hdf5 import AGAIN
from megacog.errors import DataError
from megacog.runtime.files import atomic_file

FORMAT = "megacog-frames"
VERSION = 1
_BLOCK_BYTES = 8 << 20
_MAX_ATTRIBUTE_BYTES = 16 << 10  # an object header holds 64 KiB; larger attributes move to a heap
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
            if not 1 <= size <= _MAX_ATTRIBUTE_BYTES:
                raise ValueError(f"{name} has {size} bytes; a shard holds 1 to {_MAX_ATTRIBUTE_BYTES}")

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


class ShardWriter:
    """Writes one shard; a context manager.

    Frames go to an unnamed temporary file next to the shard. A clean exit builds the shard under a
    temporary name, reads it back, syncs and renames it; an error leaves nothing behind. The bytes
    depend on the clips and the order of `add` only.
    """

    def __init__(self, path: str | Path, meta: ShardMeta, text_tokenizer: str | None = None) -> None:
        """Args:
        path: final name.
        meta: what all clips have in common.
        text_tokenizer: fingerprint of the text tokenizer, when clips come with `token_ids`.
        """
        self.path, self.meta, self._text_tokenizer = Path(path), meta, text_tokenizer
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None
        self._spool: IO[bytes] | None = None
        self._crc32: list[int] = []
        self._num_frames: list[int] = []
        self._fps: list[float] = []
        self._ids: dict[str, None] = {}
        self._captions: list[bytes] = []
        self._token_ids: list[NDArray[np.int64]] = []

    def __enter__(self) -> ShardWriter:
        with self._stack as stack:
            self._file = stack.enter_context(atomic_file(self.path))
            self._spool = stack.enter_context(tempfile.TemporaryFile(dir=self.path.parent))
            self._stack = stack.pop_all()
        return self

    def add(
        self,
        clip_id: str,
        caption: str,
        codes: NDArray[Any],
        fps: float,
        token_ids: Sequence[int] | None = None,
    ) -> None:
        """Appends one clip.

        Args:
            clip_id: unique within the shard.
            caption: text; not empty.
            codes: integers [n, h, w], n >= 1.
            fps: rate at which the frames were sampled, in frames per second.
            token_ids: text pieces of the caption; for all clips or for none.

        Raises:
            DataError: something above does not hold.
            EnvError: the disk is full.
        """
        if self._spool is None:
            raise RuntimeError("ShardWriter.add outside of its `with` block")
        where = f"{self.path}: clip {clip_id!r}"
        self._check(where, clip_id, caption, codes, fps, token_ids)
        frames = np.ascontiguousarray(codes, dtype=self.meta.dtype)
        self._spool.write(frames.data)
        self._crc32 += [zlib.crc32(frame.data) for frame in frames]
        self._ids[clip_id] = None
        self._captions.append(_utf8(where, caption))
        self._num_frames.append(len(frames))
        self._fps.append(fps)
        if token_ids is not None:
            self._token_ids.append(np.asarray(token_ids, dtype=np.int64))

    def _check(
        self,
        where: str,
        clip_id: str,
        caption: str,
        codes: NDArray[Any],
        fps: float,
        token_ids: Sequence[int] | None,
    ) -> None:
        if not clip_id or clip_id in self._ids:
            raise DataError(f"{where}: the id is {'used twice' if clip_id else 'empty'}. Give every clip its own id.")
        _utf8(where, clip_id)
        if not caption.strip():
            raise DataError(f"{where} has an empty caption. Write one, or leave the clip out.")
        if codes.ndim != 3 or len(codes) < 1 or codes.shape[1:] != self.meta.grid or codes.dtype.kind not in "iu":
            raise DataError(
                f"{where}: codes are {codes.dtype} {list(codes.shape)}, the shard holds integers "
                f"[n >= 1, {self.meta.grid[0]}, {self.meta.grid[1]}]."
            )
        if int(codes.min()) < 0 or int(codes.max()) >= self.meta.codebook_size:
            raise DataError(
                f"{where}: codes span {codes.min()}..{codes.max()}, the codebook 0..{self.meta.codebook_size - 1}. "
                "The shard's codebook_size must be that of the tokenizer that made the codes."
            )
        if not (math.isfinite(fps) and fps > 0):
            raise DataError(f"{where}: fps {fps} must be a positive number.")
        if (token_ids is None) != (self._text_tokenizer is None):
            raise ValueError("token_ids and the writer's text_tokenizer go together")
        if token_ids is not None and (len(token_ids) == 0 or min(token_ids) < 0):
            raise DataError(f"{where}: token_ids must be one or more non-negative numbers.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        spool, self._spool = self._spool, None
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            assert self._file is not None and spool is not None
            with hdf5.disk_full_as_oserror():
                offset = self._write(Path(self._file.name))
            self._copy_frames(spool, offset)
            with Shard(self._file.name) as shard:
                shard.verify()

    def _write(self, path: Path) -> int:
        """Writes everything but the frames; returns where the frames start, in bytes."""
        meta = self.meta
        num_frames = np.asarray(self._num_frames, dtype="<i8")
        with hdf5.create_file(path) as file:
            hdf5.create_group(file, "clips")
            frames = hdf5.create_dataset(file, "frames", (len(self._crc32), *meta.grid), meta.dtype)
            hdf5.write_array(file, "frames_crc32", np.asarray(self._crc32, dtype="<u4"))
            hdf5.write_array(file, "clips/first_frame", np.cumsum(num_frames, dtype="<i8") - num_frames)
            hdf5.write_array(file, "clips/num_frames", num_frames)
            hdf5.write_array(file, "clips/fps", np.asarray(self._fps, dtype="<f4"))
            hdf5.write_text(file, "clips/ids", "clips/id_offsets", [clip_id.encode() for clip_id in self._ids])
            hdf5.write_text(file, "clips/captions", "clips/caption_offsets", self._captions)
            if self._text_tokenizer is not None:
                flat = np.concatenate([np.empty(0, np.int64), *self._token_ids])
                tokens = hdf5.write_array(file, "clips/token_ids", flat.astype("<i8"))
                hdf5.write_string(tokens, "text_tokenizer", self._text_tokenizer)
                ends = np.cumsum([0, *map(len, self._token_ids)], dtype="<i8")
                hdf5.write_array(file, "clips/token_offsets", ends)
            hdf5.write_string(file, "format", FORMAT)
            file.attrs["version"] = np.int64(VERSION)
            file.attrs["grid"] = np.asarray(meta.grid, dtype="<i8")
            file.attrs["codebook_size"] = np.int64(meta.codebook_size)
            file.attrs["temporal_factor"] = np.int64(meta.temporal_factor)
            hdf5.write_string(file, "frame_tokenizer", meta.tokenizer_fingerprint)
            hdf5.write_string(file, "decoder", meta.decoder)
            hdf5.write_string(file, "settings", meta.settings)
            file.flush()
            return hdf5.file_offset(frames)

    def _copy_frames(self, spool: IO[bytes], offset: int) -> None:
        assert self._file is not None
        spool.seek(0)
        self._file.seek(offset)
        while block := spool.read(_BLOCK_BYTES):
            self._file.write(block)
        self._file.flush()


class Shard:
    """Reads one shard.

    The small arrays are read and checked at once, frames when asked for. The file is held open from
    the first read on; a copy in another process (fork or pickle) opens its own.

    Attributes:
        path: the file.
        meta: what all clips have in common.
        num_clips: V.
        clip_ids, captions: sequences of V strings.
        num_frames: int64 [V].
        fps: float32 [V], rate at which the frames were sampled.
        text_tokenizer: fingerprint of the text tokenizer of the stored `token_ids`, or None.

    Raises:
        DataError: the file is missing, no shard, of another version, truncated or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._descriptor: tuple[int, int] | None = None  # process id, file descriptor
        self._frames_crc32: NDArray[np.uint32] | None = None
        with hdf5.open_file(self.path) as file:
            self.meta = self._read_meta(file)
            frames = hdf5.find_dataset(file, self.path, "frames", self.meta.dtype.str, (None, *self.meta.grid))
            self._total_frames = len(frames)
            self._frames_offset = hdf5.file_offset(frames)
            hdf5.find_dataset(file, self.path, "frames_crc32", "<u4", (self._total_frames,))
            self._read_clips(file)

    def _read_meta(self, file: h5py.File) -> ShardMeta:
        found = file.attrs.get("format")
        if not isinstance(found, np.bytes_) or bytes(found) != FORMAT.encode():
            raise DataError(f"{self.path} is HDF5 but no {FORMAT} shard. Only files of launch/prepare.py can be used.")
        (version,) = hdf5.read_integers(file, self.path, "version", 1)
        if version != VERSION:
            raise DataError(
                f"{self.path} has shard version {version}; this megacog reads version {VERSION}. "
                "Install the megacog that wrote it, or prepare the shard again."
            )
        height, width = hdf5.read_integers(file, self.path, "grid", 2)
        (codebook_size,) = hdf5.read_integers(file, self.path, "codebook_size", 1)
        (temporal_factor,) = hdf5.read_integers(file, self.path, "temporal_factor", 1)
        strings = [hdf5.read_string(file, self.path, name) for name in ("frame_tokenizer", "decoder", "settings")]
        return ShardMeta((height, width), codebook_size, *strings, temporal_factor=temporal_factor)

    def _read_clips(self, file: h5py.File) -> None:
        def column(name: str, dtype: str, length: int | None) -> NDArray[Any]:
            return hdf5.read_array(file, self.path, f"clips/{name}", dtype, (length,))

        self.num_frames = column("num_frames", "<i8", None)
        self.num_clips = len(self.num_frames)
        self._first_frame = column("first_frame", "<i8", self.num_clips)
        self.fps = column("fps", "<f4", self.num_clips)
        ends = self._first_frame + self.num_frames
        if self.num_clips and not (
            self._first_frame.min() >= 0
            and self.num_frames.min() >= 1
            and ends.max() <= self._total_frames
            and np.isfinite(self.fps).all()
            and self.fps.min() > 0
        ):
            raise DataError(f"{self.path}: clips lie outside the frames or have impossible rates. {AGAIN}")
        self.clip_ids = TextColumn(*self._ragged(column, "ids", "id_offsets", "|u1"), f"{self.path}: /clips/ids")
        self.captions = TextColumn(
            *self._ragged(column, "captions", "caption_offsets", "|u1"), f"{self.path}: /clips/captions"
        )
        self.text_tokenizer: str | None = None
        if "token_ids" in file["clips"]:
            self._token_ids, self._token_offsets = self._ragged(column, "token_ids", "token_offsets", "<i8")
            self.text_tokenizer = hdf5.read_string(file["clips/token_ids"], self.path, "text_tokenizer")

    def _ragged(
        self, column: Callable[[str, str, int | None], NDArray[Any]], name: str, offsets_name: str, dtype: str
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        values = column(name, dtype, None)
        offsets = column(offsets_name, "<i8", self.num_clips + 1)
        if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise DataError(f"{self.path}: /clips/{offsets_name} does not fit /clips/{name}. {AGAIN}")
        return values, offsets

    def token_ids(self, clip: int) -> NDArray[np.int64]:
        """Returns the stored text pieces of a clip, int64 [L]; only when `text_tokenizer` is set."""
        if self.text_tokenizer is None:
            raise ValueError(f"{self.path} holds no token_ids")
        return self._token_ids[self._token_offsets[clip] : self._token_offsets[clip + 1]]

    def read(self, clip: int, indices: Sequence[int] | NDArray[np.integer[Any]] | slice) -> NDArray[Any]:
        """Returns the frames of a clip at `indices`, codes [k, h, w] of the stored type.

        Raises:
            DataError: a frame is damaged or holds a code outside the codebook; the message names
                shard, clip and frame.
            IndexError: an index is outside the clip.
        """
        length = int(self.num_frames[clip])
        wanted = range(*indices.indices(length)) if isinstance(indices, slice) else indices
        size, first = self.meta.frame_bytes, int(self._first_frame[clip])
        checksums = self._checksums()
        buffer = bytearray(len(wanted) * size)
        view, descriptor = memoryview(buffer), self._open()
        for slot, index in enumerate(wanted):
            if not 0 <= index < length:
                raise IndexError(f"{self.path}: clip {clip} has {length} frames, not frame {index}")
            frame = first + int(index)
            part = view[slot * size : (slot + 1) * size]
            count = os.preadv(descriptor, [part], self._frames_offset + frame * size)
            if count != size or zlib.crc32(part) != checksums[frame]:
                self._raise_damaged(clip, int(index), "truncated" if count != size else "damaged (checksum)")
        codes = np.frombuffer(buffer, dtype=self.meta.dtype).reshape(-1, *self.meta.grid)
        if codes.size and int(codes.max()) >= self.meta.codebook_size:
            slot = int(codes.reshape(len(codes), -1).max(axis=1).argmax())
            self._raise_damaged(
                clip, int(wanted[slot]), f"invalid: code {codes.max()}, codebook_size {self.meta.codebook_size}"
            )
        return codes

    def verify(self) -> None:
        """Reads every byte again and checks it.

        Raises:
            DataError: something is damaged; the message names the first damaged frame and how many there are.
        """
        Shard(self.path)  # the small arrays as they are on disk now
        list(self.clip_ids), list(self.captions)
        self._frames_crc32 = None
        checksums = self._checksums()
        size, bad = self.meta.frame_bytes, []
        step = max(1, _BLOCK_BYTES // size)
        for first in range(0, self._total_frames, step):
            count = min(step, self._total_frames - first)
            raw = memoryview(os.pread(self._open(), count * size, self._frames_offset + first * size))
            whole = len(raw) // size
            codes = np.frombuffer(raw[: whole * size], dtype=self.meta.dtype).reshape(whole, -1)
            highest = codes.max(axis=1, initial=0)
            for slot in range(count):
                intact = slot < whole and zlib.crc32(raw[slot * size : (slot + 1) * size]) == checksums[first + slot]
                if not intact or highest[slot] >= self.meta.codebook_size:
                    bad.append(first + slot)
        if bad:
            clip = int(np.searchsorted(self._first_frame, bad[0], side="right")) - 1
            what = f"damaged or outside the codebook ({len(bad)} such frames in the shard)"
            self._raise_damaged(clip, bad[0] - int(self._first_frame[clip]), what)

    def _raise_damaged(self, clip: int, index: int, what: str) -> None:
        raise DataError(f"{self.path}: frame {index} of clip {self.clip_ids[clip]!r} is {what}. {AGAIN}")

    def _checksums(self) -> NDArray[np.uint32]:
        if self._frames_crc32 is None:
            with hdf5.open_file(self.path) as file:
                self._frames_crc32 = hdf5.read_array(file, self.path, "frames_crc32", "<u4", (self._total_frames,))
        return self._frames_crc32

    def _open(self) -> int:
        process = os.getpid()
        if self._descriptor is None or self._descriptor[0] != process:
            try:
                self._descriptor = (process, os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise DataError(f"{self.path} cannot be opened any more: {error.strerror}.") from None
        return self._descriptor[1]

    def close(self) -> None:
        """Closes the file; the next read opens it again."""
        if self._descriptor is not None and self._descriptor[0] == os.getpid():
            os.close(self._descriptor[1])
        self._descriptor = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()


def _utf8(where: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: the text is not valid Unicode. Correct it or leave the clip out.") from None
