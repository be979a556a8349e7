"""The few HDF5 operations that shards need: checked arrays and attributes, reproducible files.

Reading trusts nothing: links out of the file, external or virtual storage, compressed layouts, wrong
types, wrong shapes and wrong checksums are all errors that name the file.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from megacog.errors import DataError

AGAIN = "Prepare the shard again (launch/prepare.py) or copy it again from its source."


@contextmanager
def create_file(path: Path) -> Iterator[h5py.File]:
    """Yields a new, empty file whose bytes depend on what is written only: no object has a time stamp."""
    create = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    create.set_obj_track_times(False)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_LATEST, h5py.h5f.LIBVER_LATEST)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    file_id = h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, create, access)
    with h5py.File(file_id) as file:
        yield file


def create_group(file: h5py.File, name: str) -> None:
    """Makes a group without time stamps."""
    create = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    create.set_obj_track_times(False)
    h5py.h5g.create(file.id, name.encode(), gcpl=create)


def create_dataset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> h5py.Dataset:
    """Returns a new contiguous dataset whose storage is allocated but not filled."""
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_layout(h5py.h5d.CONTIGUOUS)
    create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    create.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, create))


def write_array(file: h5py.File, name: str, values: NDArray[Any]) -> h5py.Dataset:
    """Returns a new dataset that holds `values` and, as attribute, their crc32."""
    dataset = create_dataset(file, name, values.shape, values.dtype)
    if values.size:
        dataset[...] = values
    dataset.attrs["crc32"] = np.uint32(zlib.crc32(np.ascontiguousarray(values).data))
    return dataset


def write_text(file: h5py.File, name: str, offsets: str, texts: Sequence[bytes]) -> None:
    """Writes UTF-8 texts as one array of bytes and int64 offsets (one more than texts)."""
    write_array(file, name, np.frombuffer(b"".join(texts), dtype=np.uint8))
    write_array(file, offsets, np.cumsum([0, *map(len, texts)], dtype="<i8"))


def write_string(target: h5py.File | h5py.Dataset, name: str, value: str) -> None:
    """Sets a fixed-length UTF-8 attribute (variable-length ones lie outside every checksum)."""
    raw = value.encode("utf-8")
    target.attrs.create(name, np.bytes_(raw), dtype=h5py.string_dtype("utf-8", len(raw)))


@contextmanager
def disk_full_as_oserror() -> Iterator[None]:
    """Turns HDF5's reports of a full disk (often RuntimeError) into an OSError with its errno."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # Closing the file after a failed write fails again, for a reason that follows from the first one.
        cause: BaseException | None = error
        while cause is not None:
            for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                if f"errno = {code}," in str(cause):
                    raise OSError(code, os.strerror(code)) from error
            cause = cause.__context__
        raise


def check_room(path: Path, metadata_bytes: int, total_bytes: int) -> None:
    """Check that a file can hold so much, and empty it. HDF5 itself leaves tracebacks behind when a disk is full.

    Args:
        path: an existing file.
        metadata_bytes: of everything but the frames; really reserved for the check.
        total_bytes: of the whole file; checked against limits on the size of files only.

    Raises:
        OSError: with the errno of the operating system.
    """
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, metadata_bytes)
            os.ftruncate(file.fileno(), total_bytes)
        finally:
            os.ftruncate(file.fileno(), 0)


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """Yields the file, opened for reading.

    Raises:
        DataError: the file is missing, unreadable, not HDF5, truncated or damaged; also for whatever
            HDF5 finds wrong while the block runs.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such shard. Correct the path, or make it with launch/prepare.py.")
    try:
        with open(path, "rb") as probe:
            head = probe.read(8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check permissions and the disk.") from None
    if head != b"\x89HDF\r\n\x1a\n":
        raise DataError(f"{path} is not an HDF5 file (or its first bytes are damaged). {AGAIN}")
    try:
        # Shards never change once named, so no lock is needed; locks fail on many network disks.
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except DataError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise DataError(f"{path} is truncated or damaged ({_first_line(error)}). {AGAIN}") from None


def find_dataset(file: h5py.File, path: Path, name: str, dtype: str, shape: tuple[int | None, ...]) -> h5py.Dataset:
    """Returns a dataset after checking that it lies in this file, contiguous, with this type and shape.

    Args:
        file: open shard.
        path: its name, for messages.
        name: of the dataset.
        dtype: little-endian numpy type.
        shape: expected sizes; None = any.
    """
    parts = name.split("/")
    for depth in range(1, len(parts) + 1):
        part = "/".join(parts[:depth])
        link = file.get(part, getlink=True)
        if link is None:
            raise DataError(f"{path} holds no /{part}; it is no complete shard. {AGAIN}")
        if not isinstance(link, h5py.HardLink):
            raise DataError(f"{path}: /{part} is a link to elsewhere; shards must hold their own data. {AGAIN}")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{path}: /{name} is no dataset. {AGAIN}")
    layout = dataset.id.get_create_plist()
    if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_external_count():
        raise DataError(f"{path}: /{name} is not stored contiguously inside the file. {AGAIN}")
    fits = len(dataset.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(dataset.shape, shape, strict=True)
    )
    if dataset.dtype != np.dtype(dtype) or not fits:
        want_shape = [side if side is not None else "any" for side in shape]
        raise DataError(
            f"{path}: /{name} is {dataset.dtype} {list(dataset.shape)}, "
            f"expected {np.dtype(dtype)} {want_shape}. {AGAIN}"
        )
    size = int(np.prod(dataset.shape, dtype=object)) * dataset.dtype.itemsize
    if size and file_offset(dataset) + size > path.stat().st_size:
        raise DataError(f"{path} is truncated: /{name} does not fit into the file. {AGAIN}")
    return dataset


def file_offset(dataset: h5py.Dataset) -> int:
    """Returns where the data of a contiguous dataset starts in the file, in bytes (0 if it is empty)."""
    offset = dataset.id.get_offset()
    return 0 if offset is None else int(offset)


def read_array(file: h5py.File, path: Path, name: str, dtype: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """Returns a whole small dataset after checking its crc32."""
    dataset = find_dataset(file, path, name, dtype, shape)
    values = np.empty(dataset.shape, dtype=dtype)
    if values.size:
        dataset.read_direct(values)
    if zlib.crc32(values.data) != int(dataset.attrs["crc32"]):
        raise DataError(f"{path}: /{name} is damaged (its checksum does not match). {AGAIN}")
    return values


def read_string(target: h5py.File | h5py.Dataset, path: Path, name: str) -> str:
    """Returns a fixed-length string attribute."""
    value = target.attrs.get(name)
    if not isinstance(value, np.bytes_ | bytes):
        raise DataError(f"{path} has no string attribute {name!r}; it is no complete shard. {AGAIN}")
    return bytes(value).decode("utf-8")


def read_integers(file: h5py.File, path: Path, name: str, count: int) -> tuple[int, ...]:
    """Returns an attribute of `count` integers."""
    value = np.asarray(file.attrs.get(name, ""))
    if value.size != count or value.dtype.kind not in "iu":
        raise DataError(f"{path} has no attribute {name!r} with {count} integer(s); it is no complete shard. {AGAIN}")
    return tuple(int(number) for number in value.reshape(-1))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
