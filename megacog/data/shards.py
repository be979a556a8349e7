"""HDF5 shards of pretokenized clips: writer and reader.

A shard holds the frames of many clips in one contiguous array and a few small arrays that say where
each clip lies. Every byte is covered by a checksum: frames by `/frames_crc32` (checked at every
read), small arrays by their `crc32` attribute, everything else by HDF5's own metadata checksums
(`libver="latest"`). HDF5 is opened once for the small arrays; frames are read with `pread` from the
contiguous extent, which costs no HDF5 call and is safe after fork.

Shapes: N frames of the shard, V clips, h and w codes of one frame.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from megacog.data import hdf5
from megacog.data.hdf5 import AGAIN
from megacog.data.shard_format import (
    FORMAT,
    VERSION,
    ShardMeta,
    TextColumn,
    expand_shards,
    shard_path,
)
from megacog.errors import DataError
from megacog.runtime.files import atomic_file

__all__ = ["Shard", "ShardMeta", "ShardWriter", "expand_shards", "shard_path"]

_BLOCK_BYTES = 8 << 20
_UINT32 = struct.Struct("<I")


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
            token_ids: text pieces of the clip's text: rate text of all its frames and separator, then the caption; or
                of the caption alone. For all clips or for none.

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
                f"{where}: codes span {codes.min()}..{codes.max()}, the codebook "
                f"0..{self.meta.codebook_size - 1}. Is codebook_size that of the codes' tokenizer?"
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
            path = Path(self._file.name)
            metadata_bytes = self._metadata_bytes()
            hdf5.check_room(path, metadata_bytes, metadata_bytes + spool.tell())
            with hdf5.disk_full_as_oserror():
                offset = self._write(path)
            self._copy_frames(spool, offset)
            with Shard(self._file.name) as shard:
                shard.verify()

    def _metadata_bytes(self) -> int:
        """Returns about how much the file holds besides frames: texts, numbers per clip and frame, HDF5's own."""
        texts = sum(len(text) + 16 for text in (*self._captions, *map(str.encode, self._ids)))
        tokens = sum(8 * len(ids) + 8 for ids in self._token_ids)
        return texts + tokens + 20 * len(self._num_frames) + 4 * len(self._crc32) + len(self.meta.settings) + (8 << 10)

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
        with hdf5.open_file(self.path) as file:
            self.meta = self._read_meta(file)
            frames = hdf5.find_dataset(file, self.path, "frames", self.meta.dtype.str, (None, *self.meta.grid))
            self._total_frames = len(frames)
            self._frames_offset = hdf5.file_offset(frames)
            checksums = hdf5.find_dataset(file, self.path, "frames_crc32", "<u4", (self._total_frames,))
            self._checksums_offset = hdf5.file_offset(checksums)
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
        fingerprint, decoder, settings = (
            hdf5.read_string(file, self.path, name) for name in ("frame_tokenizer", "decoder", "settings")
        )
        return ShardMeta((height, width), codebook_size, fingerprint, decoder, settings, temporal_factor)

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
            if (np.diff(self._token_offsets) < 1).any() or (len(self._token_ids) and self._token_ids.min() < 0):
                raise DataError(f"{self.path}: /clips/token_ids has clips without ids, or impossible ids. {AGAIN}")

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

    @property
    def num_token_ids(self) -> int:
        """Stored text pieces of all clips; 0 without any."""
        return 0 if self.text_tokenizer is None else len(self._token_ids)

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
        buffer = bytearray(len(wanted) * size)
        view, checksums = memoryview(buffer), bytearray(4 * length)
        if self._read_into(checksums, self._checksums_offset + 4 * first) != len(checksums):
            self._raise_damaged(clip, 0, "truncated")
        for slot, index in enumerate(wanted):
            if not 0 <= index < length:
                raise IndexError(f"{self.path}: clip {clip} has {length} frames, not frame {index}")
            part = view[slot * size : (slot + 1) * size]
            count = self._read_into(part, self._frames_offset + (first + int(index)) * size)
            if count != size or zlib.crc32(part) != _UINT32.unpack_from(checksums, 4 * int(index))[0]:
                self._raise_damaged(clip, int(index), "truncated" if count != size else "damaged (checksum)")
        codes = np.frombuffer(buffer, dtype=self.meta.dtype).reshape(-1, *self.meta.grid)
        if codes.size and int(codes.max()) >= self.meta.codebook_size:
            slot = int(codes.reshape(len(codes), -1).max(axis=1).argmax())
            self._raise_damaged(
                clip,
                int(wanted[slot]),
                f"invalid: code {codes.max()}, codebook_size {self.meta.codebook_size}",
            )
        return codes

    def digest(self) -> str:
        """Returns a sha256 of all clips: texts, rates, lengths and ids, and of frames their checksums."""
        digest = hashlib.sha256(repr(self.meta).encode())
        with hdf5.open_file(self.path) as file:
            crc32 = hdf5.read_array(file, self.path, "frames_crc32", "<u4", (self._total_frames,))
        tokens = [] if self.text_tokenizer is None else [self._token_ids, self._token_offsets]
        columns: list[NDArray[Any]] = [*self.clip_ids.arrays, *self.captions.arrays, *tokens]
        columns += [self._first_frame, self.num_frames, self.fps]
        for values in (*columns, crc32):
            digest.update(len(values).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def verify(self) -> None:
        """Reads every byte again and checks it.

        Raises:
            DataError: something is damaged; the message names the first damaged frame and how many there are.
        """
        Shard(self.path)  # the small arrays as they are on disk now
        list(self.clip_ids), list(self.captions)
        with hdf5.open_file(self.path) as file:
            checksums = hdf5.read_array(file, self.path, "frames_crc32", "<u4", (self._total_frames,))
        size, bad = self.meta.frame_bytes, []
        step = max(1, _BLOCK_BYTES // size)
        for first in range(0, self._total_frames, step):
            count = min(step, self._total_frames - first)
            raw = memoryview(bytearray(count * size))
            whole = self._read_into(raw, self._frames_offset + first * size) // size
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

    def _read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fills the buffer from an offset of the file; returns how many bytes there were."""
        try:
            return os.preadv(self._open(), [buffer], offset)
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read at byte {offset}: {error.strerror}. Check the disk or the file server."
            ) from None

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
