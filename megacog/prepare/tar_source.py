"""Webdataset tars to rows: members with one key ("0001.mp4", "0001.txt", "0001.json") make one clip.

Every tar's headers are read once, its captions with them; videos stay where they are and are decoded from
their place in the tar. What comes out is a function of the tars alone.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megacog.errors import ConfigError, DataError
from megacog.prepare.sources import (
    CAPTION_COLUMNS,
    MAX_CAPTION_CHARACTERS,
    BadRow,
    Failure,
    Row,
    Source,
    checked_caption,
    checked_text,
    printable,
)
from megacog.prepare.tar import Member, TarEntry, TarReader
from megacog.runtime.log import get_logger

VIDEO_ENDINGS = ("mp4", "m4v", "mov", "mkv", "webm", "gif", "png", "jpg", "jpeg")
"""The first of them that a sample has is its video."""
MAX_MEMBER_BYTES = 4 << 30
_MAX_TEXT_BYTES = 8 * MAX_CAPTION_CHARACTERS
_MAX_JSON_BYTES = 1 << 20
_COMPRESSED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILD = re.compile(r"[*?\[{]")
_MAX_TARS = 1_000_000
# Reading headers waits for the disk more than it computes.
_READERS = 16
_NAMED = 5
logger = get_logger(__name__)


@dataclass(slots=True)
class _Sample:
    """The members of one key that matter: by their ending."""

    members: dict[str, TarEntry] = field(default_factory=dict)


@dataclass(slots=True)
class _Outcome:
    """One sample or member of a tar: a clip (video and caption) or the reason why there is none."""

    name: str
    caption: str = ""
    video: TarEntry | None = None
    reason: str = ""


def names_tars(captions: Sequence[Path]) -> bool:
    """Returns whether the first of these is a tar (or a pattern for tars) rather than a caption table.

    Raises:
        ConfigError: they are tars, compressed.
    """
    name = captions[0].name.lower()
    if name.endswith(_COMPRESSED_ENDINGS):
        raise ConfigError(
            f"{captions[0]}: compressed tars are not read, since no member can be reached without unpacking all that "
            "stand before it. Unpack it to a plain .tar (videos are compressed themselves)."
        )
    return name.endswith(".tar")


def read_tars(
    patterns: Sequence[Path], root: Path, caption_key: str | None = None, allow_absolute: bool = False
) -> Source:
    """Returns the clips of tars.

    A clip's id is its tar's path from that folder and its member's name: "part/00012.tar/0001.mp4".

    Args:
        patterns: tars; globs and braces ("{00000..00041}.tar") are expanded, in name order.
        root: folder that ids start from.
        caption_key: take captions from this key of the .json members; None = from .txt, else from the first
            of CAPTION_COLUMNS that the .json has.
        allow_absolute: tars may lie outside the root.

    Raises:
        DataError: a tar is missing, truncated or damaged, or there is not one sample.
    """
    paths = expand_tars(patterns)
    names = [_tar_name(path, root.resolve(), allow_absolute) for path in paths]
    _refuse_twice(names)
    shown = str(patterns[0]) if len(patterns) == 1 else f"{patterns[0]} and {len(patterns) - 1} more"
    source = Source(Path(shown), "", "tar member", "txt or json" if caption_key is None else caption_key)
    digest = hashlib.sha256()
    damaged = []
    with ThreadPoolExecutor(_READERS) as pool:
        read = [pool.submit(_read_tar, path, caption_key) for path in paths]
        for name, future in zip(names, read, strict=True):
            try:
                outcomes = future.result()
            except DataError as error:
                damaged.append(str(error))
                continue
            _add(source, name, outcomes, digest)
    if damaged:
        more = f" (and {len(damaged) - _NAMED} more)" if len(damaged) > _NAMED else ""
        raise DataError("; ".join(damaged[:_NAMED]) + more)
    if not source.rows and not source.failures:
        raise DataError(f"{shown}: no member is a video or a caption. Samples are KEY.mp4 with KEY.txt or KEY.json.")
    source.sha256 = digest.hexdigest()
    _warn_of_repeated_names(source.rows)
    return source


def expand_tars(patterns: Sequence[Path]) -> list[Path]:
    """Returns the tars that paths, globs and braces name, in the order of the patterns, each by name.

    Raises:
        DataError: one names nothing, or too many.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        text = os.path.expanduser(str(pattern))
        for name in [text] if Path(text).is_file() else _braces(text):
            paths = [Path(name)] if Path(name).is_file() else [Path(path) for path in sorted(glob.glob(name))]
            if not paths:
                raise DataError(f"no tar matches {name!r} (looked from {os.getcwd()}). Correct the pattern.")
            found.update(dict.fromkeys(paths))
    return list(found)


def _braces(pattern: str) -> Iterator[str]:
    """Yields a pattern with {00..12} and {a,b} filled in, as shells do.

    Raises:
        DataError: a range makes too many names.
    """
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    if span := _RANGE.fullmatch(match[1]):
        first, last = int(span[1]), int(span[2])
        if abs(last - first) >= _MAX_TARS:
            raise DataError(f"{pattern}: more than {_MAX_TARS} tars. Name them in several runs.")
        step = 1 if last >= first else -1
        padded = max(len(span[1]), len(span[2])) if span[1].startswith("0") or span[2].startswith("0") else 0
        values = [str(number).zfill(padded) for number in range(first, last + step, step)]
    else:
        values = match[1].split(",")
    for value in values:
        yield from _braces(pattern[: match.start()] + value + pattern[match.end() :])


def fixed_folder(pattern: Path) -> str:
    """Returns the deepest folder above a pattern's wildcards."""
    path = Path(os.path.expanduser(str(pattern))).absolute()
    folder = path.parent
    while not path.is_file() and _WILD.search(str(folder)):
        folder = folder.parent
    return str(folder)


def _tar_name(path: Path, root: Path, allow_absolute: bool) -> str:
    """Returns a tar's path from the root; of one outside, the absolute one.

    Raises:
        DataError: it lies outside, or cannot be part of an id.
    """
    if not allow_absolute and not path.resolve().is_relative_to(root):
        raise DataError(f"{path} lies outside {root}. Name its folder with --root, or pass --allow-absolute.")
    inside = path.parent.resolve() / path.name
    try:
        return checked_text(
            "tar's path", inside.relative_to(root).as_posix() if inside.is_relative_to(root) else str(inside)
        )
    except BadRow as bad:
        raise DataError(f"{printable(str(path))!r}: {bad}. Rename the tar.") from None


def _refuse_twice(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the tar {twice} is named twice. Name every tar once.")


def _add(source: Source, tar: str, outcomes: Sequence[_Outcome], digest: hashlib._Hash) -> None:
    """Adds a tar's outcomes to the source, numbered on, and to the digest of all that depends on the tars."""
    for outcome in outcomes:
        line = len(source.rows) + len(source.failures) + 1
        clip_id = f"{tar}/{outcome.name}"
        if outcome.video is None:
            source.failures.append(Failure(line, printable(clip_id), printable(outcome.reason)))
            fields: list[object] = [printable(clip_id), printable(outcome.reason)]
        else:
            video = outcome.video
            row = Row(line, clip_id, outcome.caption, str(Member(tar, outcome.name, video.offset, video.size)))
            source.rows.append(row)
            fields = [clip_id, outcome.caption, video.offset, video.size]
        digest.update(json.dumps(fields).encode())


def _warn_of_repeated_names(rows: Sequence[Row]) -> None:
    """Says how many names stand in several tars: numbered tar by tar, or the same videos twice."""
    hashes = np.fromiter((hash(row.own_name) for row in rows), np.int64, len(rows))
    if repeated := len(rows) - len(np.unique(hashes)):
        seen: dict[str, str] = {}
        example = next(row for row in rows if seen.setdefault(row.own_name, row.clip_id) != row.clip_id)
        logger.warning(
            "%d members have names that stand in another tar too, e.g. %s and %s: taken for different clips, both for "
            "training or both for evaluation",
            repeated,
            seen[example.own_name],
            example.clip_id,
        )


def _read_tar(path: Path, caption_key: str | None) -> list[_Outcome]:
    """Returns the clips and the bad members of one tar, in the order of the archive."""
    samples: dict[str, _Sample] = {}
    outcomes: list[_Outcome | _Sample] = []
    with TarReader(path) as reader:
        for entry in reader.entries():
            if entry.kind == "a folder":
                continue
            try:
                key, ending = _key(entry)
                sample = samples.get(key)
                if sample is None:
                    sample = samples[key] = _Sample()
                    outcomes.append(sample)
                if ending in sample.members:
                    raise BadRow("a member of this name again; the first is used")
                sample.members[ending] = entry
            except BadRow as bad:
                outcomes.append(_Outcome(entry.name, reason=str(bad)))
        made = [_outcome(item, reader, caption_key) if isinstance(item, _Sample) else item for item in outcomes]
    return [outcome for outcome in made if outcome is not None]


def _key(entry: TarEntry) -> tuple[str, str]:
    """Returns the key of a member's sample and its ending, as webdataset cuts them: at the name's first dot.

    Raises:
        BadRow: the member is no file, too large, or its name is none to be used.
    """
    name = checked_text("member's name", entry.name)
    if name.startswith("/") or ".." in name.split("/"):
        raise BadRow("the member's name leads out of the tar")
    if entry.kind:
        raise BadRow(f"the member is {entry.kind}, no file")
    if entry.size > MAX_MEMBER_BYTES:
        raise BadRow(f"the member has {entry.size} bytes, more than {MAX_MEMBER_BYTES}; give it as a file of its own")
    folder, base = posixpath.split(posixpath.normpath(name))
    stem, _, ending = base.partition(".")
    return posixpath.join(folder, stem), ending.lower()


def _outcome(sample: _Sample, reader: TarReader, caption_key: str | None) -> _Outcome | None:
    """Returns what becomes of a sample; None for one without anything that looks like a clip."""
    members = sample.members
    ending = next((ending for ending in VIDEO_ENDINGS if ending in members), None)
    first = next(iter(members.values()), None)
    if first is None:
        return None
    if ending is None:
        told = [members[name] for name in ("txt", "json") if name in members]
        return _Outcome(told[0].name, reason="a caption without a video") if told else None
    video = members[ending]
    name = posixpath.normpath(video.name)
    try:
        return _Outcome(name, _caption(members, reader, caption_key), video)
    except BadRow as bad:
        return _Outcome(name, reason=str(bad))


def _caption(members: dict[str, TarEntry], reader: TarReader, caption_key: str | None) -> str:
    if "txt" in members and caption_key is None:
        return checked_caption(_content(members["txt"], reader, _MAX_TEXT_BYTES).decode("utf-8", "surrogateescape"))
    if "json" not in members:
        raise BadRow(f"no caption: its sample has no {'.json' if caption_key else '.txt or .json'}")
    try:
        record = json.loads(_content(members["json"], reader, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise BadRow(f"its .json is not JSON: {error}") from None
    keys = CAPTION_COLUMNS if caption_key is None else (caption_key,)
    key = next((key for key in keys if isinstance(record, dict) and key in record), None)
    if key is None:
        raise BadRow(f"no caption: its .json has no {' or '.join(map(repr, keys))}")
    if not isinstance(record[key], str):
        raise BadRow(f"{key!r} in its .json is {type(record[key]).__name__}, not text")
    return checked_caption(record[key])


def _content(entry: TarEntry, reader: TarReader, limit: int) -> bytes:
    if entry.size > limit:
        raise BadRow(f"its caption member has {entry.size} bytes, more than {limit}")
    return reader.read(entry.offset, entry.size)
