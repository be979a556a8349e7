"""Which video container a file is, and whether all of it is there.

The format comes from the file's own bytes and is forced on the demuxer: an .m3u8 or concat list that
is named .mp4 is never parsed as a play list (it could name other files or URLs). FFmpeg decodes many
truncated files without an error, so the outermost structure is checked against the file size first.
"""

from __future__ import annotations

import os
from typing import BinaryIO

_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
_MOV_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")


class ClipError(Exception):
    """One clip cannot be prepared; the message is the reason written to failed.jsonl."""


def container_format(file: BinaryIO) -> str:
    """Returns FFmpeg's name of the demuxer for a complete file: mov, matroska or gif.

    Args:
        file: at its start; read as far as needed.

    Raises:
        ClipError: another format, or the file ends before its structure does.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    if not head:
        raise ClipError("the file is empty")
    if head[4:8] in _MOV_FIRST_BOXES:
        _check_boxes(file, size)
        return "mov"
    if head[:4] == _EBML.to_bytes(4, "big"):
        _check_segment(file, size)
        return "matroska"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        _check_blocks(file)
        return "gif"
    raise ClipError(f"not an mp4, mov, mkv, webm or gif file (it starts with {head[:8]!r})")


def _check_boxes(file: BinaryIO, size: int) -> None:
    """Walk the top-level boxes of an mp4 or mov file."""
    seen = set()
    offset = 0
    while offset + 8 <= size:
        file.seek(offset)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if not all(32 <= byte < 127 for byte in kind):
            break
        seen.add(kind)
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length == 0:
            break
        if length < 8:
            raise ClipError(f"damaged: box {kind.decode()!r} at byte {offset} claims {length} bytes")
        offset += length
        if offset > size:
            raise ClipError(
                f"truncated: box {kind.decode()!r} should end at byte {offset}, the file has {size}"
            )
    if b"moov" not in seen:
        raise ClipError("truncated or never finished: it has no 'moov' box (the index of its frames)")


def _check_segment(file: BinaryIO, size: int) -> None:
    """Find the Segment element of a Matroska or WebM file and compare its end with the file's."""
    while file.tell() < size:
        element = _vint(file, keep_marker=True)
        length = _vint(file, keep_marker=False)
        if element is None or length is None:
            break
        if element == _SEGMENT:
            end = file.tell() + length
            if length >= 0 and end > size:
                raise ClipError(f"truncated: its segment should end at byte {end}, the file has {size}")
            return
        file.seek(max(length, 0), os.SEEK_CUR)
    raise ClipError("truncated: the file ends before its first segment")


def _vint(file: BinaryIO, keep_marker: bool) -> int | None:
    """Returns an EBML variable-length number, -1 for "unknown size" (live recordings), None at the end."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    extra = 8 - first[0].bit_length()
    rest = file.read(extra)
    if len(rest) < extra:
        return None
    value = int.from_bytes(first + rest, "big")
    if keep_marker:
        return value
    value &= (1 << (7 * (extra + 1))) - 1
    return -1 if value == (1 << (7 * (extra + 1))) - 1 else value


def _check_blocks(file: BinaryIO) -> None:
    """Walk the blocks of a GIF file up to its trailer."""
    header = file.read(13)
    if len(header) == 13:
        _skip_colors(file, header[10])
        while kind := file.read(1):
            if kind == b"\x3b":
                return
            if kind == b"\x21":
                file.seek(1, os.SEEK_CUR)
            elif kind == b"\x2c":
                descriptor = file.read(9)
                if len(descriptor) < 9:
                    break
                _skip_colors(file, descriptor[8])
                file.seek(1, os.SEEK_CUR)
            else:
                raise ClipError(f"damaged: unknown GIF block {kind!r} at byte {file.tell() - 1}")
            while count := file.read(1):
                if count == b"\0":
                    break
                file.seek(count[0], os.SEEK_CUR)
    raise ClipError("truncated: the GIF ends before its trailer")


def _skip_colors(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        file.seek(3 << ((flags & 7) + 1), os.SEEK_CUR)
