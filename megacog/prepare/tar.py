"""Members of a tar, found without unpacking anything: where each one's bytes lie, and a window on them.

Only headers are read, one after another; nothing that an archive says is ever used as a path to open. Python's
`tarfile` is not used: it takes a damaged header behind the first member for the end of the archive, and an archive
cut between two members for a whole one.

Formats: v7, ustar, GNU and pax (IEEE Std 1003.1, pax interchange format).
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megacog.errors import DataError

_BLOCK = 512
_MAX_EXTENSION_BYTES = 1 << 20
"""Of a long name or of pax records; people's are below a few KiB."""
_WINDOW_BYTES = 8 << 10
_SKIM_BYTES = 1 << 20
_OCTAL = re.compile(rb"[0-7]*")
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]+)=")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_WITHOUT_DATA = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a named pipe",
}
_SEPARATOR = "\0"


@dataclass(frozen=True, slots=True)
class TarEntry:
    """One member of a tar.

    Attributes:
        name: as the archive spells it; bytes that are not UTF-8 are surrogates.
        offset: of its first byte in the tar.
        size: in bytes.
        kind: "" for a regular file, else what it is, e.g. "a symbolic link".
    """

    name: str
    offset: int
    size: int
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar, as it is handed to a decoder process.

    Attributes:
        tar: path of the tar, absolute or from the root folder.
        name: of the file.
        offset: of its first byte.
        size: in bytes.
    """

    tar: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        # No path holds a NUL, so this is never the name of a video outside a tar.
        return _SEPARATOR.join((self.tar, str(self.offset), str(self.size), self.name))

    @staticmethod
    def parse(text: str) -> Member:
        """Returns what `str` of a member says."""
        tar, offset, size, name = text.split(_SEPARATOR)
        return Member(tar, name, int(offset), int(size))

    @staticmethod
    def names(text: str) -> bool:
        """Returns whether a text is `str` of a member rather than a path."""
        return _SEPARATOR in text


class TarWindow(io.RawIOBase):
    """The bytes of one member as a read-only file."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file = open(path, "rb", buffering=0)
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves as files do; a place before the first byte is an error."""
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if position < 0:
            raise ValueError(f"seek to {position}")
        self._position = position
        return position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fills the buffer from the current place; returns the bytes read."""
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._size - self._position)]
        count = os.preadv(self._file.fileno(), [view], self._offset + self._position) if len(view) else 0
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class TarReader:
    """Reads the headers of one tar; a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises: DataError: the file cannot be opened."""
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)
        except OSError as error:
            raise DataError(f"{path} cannot be opened: {error.strerror}.") from None
        self.size = os.fstat(self._file.fileno()).st_size
        self._window, self._window_offset = b"", 0

    def __enter__(self) -> TarReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Returns bytes of the tar, fewer at its end; small neighbors come from one system call."""
        start = offset - self._window_offset
        if not 0 <= start <= start + size <= len(self._window):
            self._window = os.pread(self._file.fileno(), max(size, _WINDOW_BYTES), offset)
            self._window_offset, start = offset, 0
        return self._window[start : start + size]

    def entries(self) -> Iterator[TarEntry]:
        """Yields the members in the order of the archive, folders included.

        Raises:
            DataError: the tar is truncated, damaged, compressed or no tar; the message names file and byte.
        """
        position = 0
        name: str | None = None
        size: int | None = None
        sparse = False
        while True:
            header = self.read(position, _BLOCK)
            if len(header) < _BLOCK:
                self._fail(position, "it ends without an end mark: truncated")
            if not any(header):
                self._require_end(position + _BLOCK)
                return
            self._check_sum(header, position)
            kind = header[156:157]
            data = position + _BLOCK
            stored = self._number(header[124:136], position)
            if kind in (b"L", b"x", b"g", b"K"):
                body = self._extension(position, data, stored)
                if kind == b"L":
                    name = _text(body.split(b"\0", 1)[0])
                elif kind == b"x":
                    records = self._pax_records(body, position)
                    name = _text(records[b"path"]) if b"path" in records else name
                    size = self._pax_size(records, position) if b"size" in records else size
                    sparse = any(key.startswith(b"GNU.sparse.") for key in records)
                position = data + _padded(stored)
                continue
            entry_name = _name(header) if name is None else name
            what = self._kind(kind, entry_name, sparse)
            if kind == b"S":
                data = self._behind_sparse_map(header, data)
            length = 0 if kind in _WITHOUT_DATA else stored if size is None else size
            if data + length > self.size:
                what = f"member {_shown(entry_name)} should end at byte {data + length}, the file has {self.size}"
                self._fail(position, f"{what}: truncated")
            yield TarEntry(entry_name, data, length, what)
            position = data + _padded(length)
            name, size, sparse = None, None, False

    def _kind(self, kind: bytes, name: str, sparse: bool) -> str:
        if kind in _WITHOUT_DATA:
            return _WITHOUT_DATA[kind]
        if kind == b"S" or sparse:
            return "a sparse file"
        if kind not in (b"\0", b"0", b"7"):
            return f"of unknown type {kind!r}"
        # Before ustar a folder was a file whose name ends with a slash.
        return "a folder" if kind == b"\0" and name.endswith("/") else ""

    def _behind_sparse_map(self, header: bytes, data: int) -> int:
        """Returns where the data of an old GNU sparse file starts: behind the blocks that go on with its map."""
        more = header[482]
        while more:
            block = self.read(data, _BLOCK)
            if len(block) < _BLOCK:
                self._fail(data, "it ends inside a member's map: truncated")
            data, more = data + _BLOCK, block[504]
        return data

    def _check_sum(self, header: bytes, position: int) -> None:
        field = header[148:156].split(b"\0", 1)[0].strip()
        if _OCTAL.fullmatch(field) and field and int(field, 8) == sum(header) - sum(header[148:156]) + 8 * 32:
            return
        if position == 0:
            for magic, name in _COMPRESSED.items():
                if header.startswith(magic):
                    raise DataError(
                        f"{self.path} is compressed ({name}); its members cannot be reached without unpacking all that "
                        "stand before them. Unpack it to a plain .tar (videos are compressed themselves)."
                    )
            raise DataError(f"{self.path} is no tar, or damaged at byte 0: its first header has no valid checksum.")
        self._fail(position, "damaged: what should be a member's header has no valid checksum")

    def _number(self, field: bytes, position: int) -> int:
        """Returns a number in octal digits or, with the highest bit set, in base 256."""
        if field[0] & 0x80:
            if field[0] & 0x40:
                self._fail(position, "damaged: a member has a negative size")
            return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        digits = field.split(b"\0", 1)[0].strip()
        if not _OCTAL.fullmatch(digits):
            self._fail(position, f"damaged: a member's size is {digits!r}")
        return int(digits or b"0", 8)

    def _extension(self, position: int, data: int, size: int) -> bytes:
        if size > _MAX_EXTENSION_BYTES:
            self._fail(position, f"a name or pax header of {size} bytes, more than {_MAX_EXTENSION_BYTES}")
        body = self.read(data, size)
        if len(body) < size:
            self._fail(position, "it ends inside a header: truncated")
        return body

    def _pax_records(self, body: bytes, position: int) -> dict[bytes, bytes]:
        records = {}
        at = 0
        while at < len(body) and body[at]:
            match = _PAX_RECORD.match(body, at)
            end = at + int(match[1]) if match else 0
            if match is None or end <= match.end() or body[end - 1 : end] != b"\n":
                self._fail(position, "damaged: malformed pax records")
            records[match[2]] = body[match.end() : end - 1]
            at = end
        return records

    def _pax_size(self, records: dict[bytes, bytes], position: int) -> int:
        if not re.fullmatch(rb"\d{1,19}", records[b"size"]):
            self._fail(position, f"damaged: a pax header gives the size {records[b'size'][:32]!r}")
        return int(records[b"size"])

    def _require_end(self, position: int) -> None:
        for offset in range(position, self.size, _SKIM_BYTES):
            block = os.pread(self._file.fileno(), _SKIM_BYTES, offset)
            if block.count(0) != len(block):
                self._fail(position, "data follows its end mark (several tars joined by cat?)")

    def _fail(self, position: int, what: str) -> NoReturn:
        raise DataError(f"{self.path}: at byte {position}: {what}. Copy or pack the tar again, or leave it out.")


def _shown(text: str) -> str:
    """Returns a name with control characters and bad UTF-8 escaped."""
    return ascii(text) if not text.isprintable() else repr(text)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    # GNU's own format keeps times where POSIX has the prefix.
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return _text(name)
