"""Files that are there completely or not at all.

Everything is written under a temporary name in the target's own folder, synced, and renamed; a
killed writer leaves a hidden `.<name>.tmp-*` entry that no reader takes for the real thing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from megacog.errors import DataError, EnvError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_MENDS = {
    errno.ENOSPC: "Free some space, or choose another place, and run again.",
    errno.EDQUOT: "Free some of your quota, or choose another place, and run again.",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f) and run again.",
    errno.EACCES: "Change its permissions or choose another place.",
    errno.EPERM: "Change its permissions or choose another place.",
    errno.EROFS: "The file system is read-only; choose another place.",
    errno.ENOTDIR: "A file stands where a folder is needed; choose another place.",
    errno.EEXIST: "Something else stands there already; choose another place.",
    errno.EISDIR: "A folder stands where a file is needed; name a file.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
    errno.EIO: "The disk or the way to it fails; check it, or choose another place.",
    errno.ESTALE: "The network disk has lost the file; run again.",
}
"""What a user can do about errors of paths, disks and limits."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FolderKind:
    """What tells a folder of ours: it holds `file`, a JSON object whose "format" is `format`."""

    file: str
    format: str


@contextmanager
def atomic_file(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Yield a file that appears at `path`, durably, when the block ends without an error.

    Args:
        path: the final name; its folder is made if missing; an existing file is replaced.
        mode: "wb" or "w" (UTF-8, newlines as written).

    Raises:
        EnvError: the disk is full; neither the temporary nor a partial file remains.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode must be 'wb' or 'w', not {mode!r}")
    path = Path(path)
    temporary = _temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text: dict[str, str] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        with open(temporary, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)  # the name that people know
        _raise_for_space(error, path)
    finally:
        with suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write a value as JSON in readable form, completely or not at all; see `atomic_file`."""
    with atomic_file(path, "w") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


@contextmanager
def atomic_directory(path: Path | str, replace: FolderKind | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path`, durably, when the block ends without an error.

    Args:
        path: the final name; its parent is made if missing.
        replace: an existing folder of this kind is replaced, whatever else it lacks; any other one is an error
            (an empty one is not), so that no folder of other things is removed by mistake.

    Raises:
        EnvError: `path` exists already, or the disk is full; nothing new remains.
    """
    path = Path(path)
    if replace is not None:
        require_replaceable(path, replace)
    else:
        _require_free_name(path)
    temporary = _temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _sync_tree(temporary)
        if replace is None:
            _require_free_name(path)
        _move_into_place(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        _raise_for_space(error, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_file(path: Path | str) -> None:
    """Make the bytes of a file durable.

    Raises:
        OSError: They may be lost; errno and path say why.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)  # syncing names no file
        raise
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the entries of a folder (names after a rename) durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; they order renames themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sha256_file(path: Path | str) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def crc32_file(path: Path | str) -> int:
    """Return the crc32 (unsigned) of a file's bytes."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def environment_error(error: OSError) -> EnvError | None:
    """Return what a user is told about an error of a path, disk or limit; None for errors that only a bug explains."""
    if error.errno not in _MENDS:
        return None
    where = f"{error.filename}: " if error.filename is not None else ""
    return EnvError(f"{where}{os.strerror(error.errno)}. {_MENDS[error.errno]}")


def require_space(path: Path | str, needed_bytes: int) -> None:
    """Check that the file system of `path` (which need not exist yet) has room for `needed_bytes`.

    Raises:
        EnvError: it has not; the message names needed and free bytes.
    """
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise EnvError(
            f"{path}: not enough disk space: {needed_bytes} bytes ({needed_bytes / 2**30:.2f} GiB) needed, "
            f"{free_bytes} bytes ({free_bytes / 2**30:.2f} GiB) free. "
            "Free some space or choose another folder."
        )


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:12]}")


def require_replaceable(path: Path, kind: FolderKind) -> None:
    """Check that what is at `path`, if anything, is a folder that may be replaced by one of its own kind.

    Raises:
        EnvError: it is a file, or a folder of other things, or lies below a file.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise EnvError(f"{path} cannot be made: {above} is a file. Choose another place.")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir():
        raise EnvError(f"{path} is a file and is not replaced by a folder. Remove it or choose another name.")
    if not _is_of_kind(path, kind):
        raise EnvError(
            f"{path} holds no {kind.file} of {kind.format}, so it is something else and is not replaced. "
            "Remove it yourself or choose another name."
        )


def require_place(path: Path, kind: FolderKind, force: bool) -> None:
    """Check that a command may make a folder at `path`: nothing is there, or `force` and it may be replaced.

    Raises:
        DataError: something is there, and not `force`.
        EnvError: see `require_replaceable`.
    """
    if path.exists() and not force:
        raise DataError(f"{path} exists already; choose another folder or pass --force to replace it")
    require_replaceable(path, kind)


def _is_of_kind(path: Path, kind: FolderKind) -> bool:
    try:
        found = json.loads((path / kind.file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == kind.format


def _require_free_name(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise EnvError(f"{path} exists already and is not overwritten. Remove it or choose another name.")


def _move_into_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
        return
    # A folder cannot be renamed over a non-empty one, so the old one steps aside first.
    old = _temporary_name(path)
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            sync_file(os.path.join(folder, name))
        sync_directory(Path(folder))


def _raise_for_space(error: OSError, path: Path) -> NoReturn:
    if error.errno in _NO_SPACE:
        raise EnvError(
            f"{path}: no space left on the disk while writing; nothing was left half-written. "
            "Free some space (or quota) and run again."
        ) from error
    raise error
