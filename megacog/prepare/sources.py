"""Caption files (csv, tsv, jsonl) to rows: which video goes with which caption, and which rows are bad. Tars are
read by `megacog.prepare.tar_source`.

What comes out is a function of the caption file's bytes alone; whether a video exists and can be
decoded is found out when its turn comes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import posixpath
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from megacog.errors import DataError
from megacog.prepare.tar import Member
from megacog.runtime.files import sha256_file

VIDEO_COLUMNS = ("video", "video_path", "path", "file", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "text", "prompt", "description")
MAX_CAPTION_CHARACTERS = 10_000
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Row:
    """One clip to prepare.

    Attributes:
        line: where it starts in the caption file, from 1; of tars, the sample's number.
        clip_id: the video's path, cleaned ("a/./b.mp4" is "a/b.mp4").
        caption: text with single spaces.
        place: of a video inside a tar, as `megacog.prepare.tar.Member` writes it; "" for a file of its own.
    """

    line: int
    clip_id: str
    caption: str
    place: str = ""

    @property
    def video(self) -> str:
        """What the decoder opens."""
        return self.place or self.clip_id

    @property
    def own_name(self) -> str:
        """The name that the video brings along wherever it lies: its path, inside a tar its member's name."""
        return Member.parse(self.place).name if self.place else self.clip_id


@dataclass(frozen=True, slots=True)
class Failure:
    """One row without a clip, and why."""

    line: int
    video: str
    reason: str


@dataclass
class Source:
    """A caption file's rows, or those of tars.

    Attributes:
        path: the caption file; of tars, what names them.
        sha256: of its bytes; of tars, of all rows and failures.
        video_column: the column or key that was taken for the video's path.
        caption_column: the column or key that was taken for the caption.
        rows: good rows in file order.
        failures: bad rows in file order.
    """

    path: Path
    sha256: str
    video_column: str
    caption_column: str
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class BadRow(Exception):
    """A row without a clip: the message is the reason, `video` what the row says about its video, as far as known."""

    def __init__(self, reason: str, video: str = "") -> None:
        super().__init__(reason)
        self.video = video


def read_source(
    path: Path,
    video_column: str | None = None,
    caption_column: str | None = None,
    allow_absolute: bool = False,
) -> Source:
    """Returns the rows of a caption file.

    Args:
        path: .csv or .tsv with a header line, or .jsonl with one object per line; UTF-8.
        video_column: name of the column with the video's path; None = the first of VIDEO_COLUMNS there is.
        caption_column: name of the column with the caption; None = the first of CAPTION_COLUMNS there is.
        allow_absolute: absolute paths and paths that start with `..` are allowed.

    Raises:
        DataError: the file is missing, of another kind, has no such columns or no rows.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such caption file. Give a .csv (header video,caption) or .jsonl file.")
    suffix = path.suffix.lower()
    if suffix in _DELIMITERS:
        records: Iterator[tuple[int, dict[str, object] | BadRow]] = _table_records(path, _DELIMITERS[suffix])
    elif suffix in _JSON_SUFFIXES:
        records = _json_records(path)
    else:
        raise DataError(
            f"{path}: captions are read from .csv, .tsv or .jsonl files, not {suffix or 'this'!r}."
        )
    columns = _Columns(path, video_column, caption_column)
    source = Source(path, sha256_file(path), "", "")
    lines: dict[str, int] = {}
    no_columns: DataError | None = None
    for line, record in records:
        try:
            if isinstance(record, BadRow):
                raise record
            try:
                columns.settle(list(record))
            except DataError as error:
                no_columns = no_columns or error
                raise BadRow("has no video and caption") from error
            row = _row(line, record, columns, allow_absolute)
            if row.clip_id in lines:
                raise BadRow(
                    f"the video of line {lines[row.clip_id]} again; a video has one caption", row.clip_id
                )
        except BadRow as bad:
            source.failures.append(Failure(line, printable(bad.video), printable(str(bad))))
        else:
            lines[row.clip_id] = line
            source.rows.append(row)
    if not source.rows and not source.failures:
        raise DataError(f"{path} has no rows. Write one line per clip: its video's path and its caption.")
    if no_columns is not None and not columns.caption:
        raise no_columns
    source.video_column, source.caption_column = columns.video, columns.caption
    return source


def printable(text: str) -> str:
    r"""Returns text with bytes that are not UTF-8 spelled as \xff."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def split_rows(rows: list[Row], eval_fraction: float) -> dict[str, list[Row]]:
    """Returns the rows by part: {"": all} without evaluation, else {"train": ..., "eval": ...}.

    A row's part depends on its own name alone, so it stays where it is when rows are added, and copies in several
    tars go the same way; only when that leaves a part empty, the row nearest to it changes over.

    Raises:
        DataError: fewer than two rows are to be split.
    """
    if eval_fraction == 0:
        return {"": rows}
    if len(rows) < 2:
        raise DataError(f"--eval-fraction needs at least two videos, there are {len(rows)}")
    draws = [_uniform(row.own_name) for row in rows]
    threshold = max(eval_fraction, min(draws) + 2**-49)
    threshold = min(threshold, max(draws))
    return {
        "train": [row for row, draw in zip(rows, draws, strict=True) if draw >= threshold],
        "eval": [row for row, draw in zip(rows, draws, strict=True) if draw < threshold],
    }


def _uniform(name: str) -> float:
    """Returns a number in [0, 1) that is a fixed function of the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


class _Columns:
    """Names of the two columns, settled by the first record that has both."""

    def __init__(self, path: Path, video: str | None, caption: str | None) -> None:
        self._path, self._wanted = path, (video, caption)
        self.video = self.caption = ""

    def settle(self, names: list[str]) -> None:
        """Raises: DataError: the names do not hold both."""
        if not self.caption:
            self.video = self._choose(names, self._wanted[0], VIDEO_COLUMNS, "--video-column")
            self.caption = self._choose(names, self._wanted[1], CAPTION_COLUMNS, "--caption-column")

    def _choose(self, names: list[str], wanted: str | None, usual: tuple[str, ...], option: str) -> str:
        if wanted is None:
            found = next((name for name in usual if name in names), None)
            missing = f"none of its columns {names} is called {', '.join(usual[:-1])} or {usual[-1]}"
            hint = f"Name the right one with {option}."
        else:
            found = wanted if wanted in names else None
            missing = f"it has no column {wanted!r}, only {names}"
            close = get_close_matches(wanted, names, n=1)
            hint = f"Did you mean {option} {close[0]}?" if close else f"Correct {option}."
        if found is None:
            raise DataError(f"{self._path}: {printable(missing)}. {hint}")
        return found


def _table_records(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, object] | BadRow]]:
    """Yields (line, columns by name) of a csv or tsv file."""
    # surrogateescape: one row that is not UTF-8 costs this row, not the file.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise DataError(
                        f"{path}:{line}: a quote opened here is never closed. "
                        "Close it, or double quotes inside text."
                    ) from None
                yield line, BadRow(f"malformed row: {error}")
                continue
            if fields is None:
                return
            if header is None:
                header = [name.strip() for name in fields]
                continue
            if not fields:
                continue
            if len(fields) != len(header):
                text = f"{len(fields)} columns, the header has {len(header)}; "
                text += f"quote text that contains {delimiter!r}"
                yield line, BadRow(text, fields[0])
                continue
            yield line, dict(zip(header, fields, strict=True))


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, object] | BadRow]]:
    """Yields (line, object) of a jsonl file."""
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                record = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield line, BadRow(f"not UTF-8: {error}")
            except (ValueError, RecursionError) as error:
                yield line, BadRow(f"not JSON: {error}")
            else:
                yield line, record if isinstance(record, dict) else BadRow("not a JSON object")


def _row(line: int, record: dict[str, object], columns: _Columns, allow_absolute: bool) -> Row:
    video = _text(record, columns.video, "")
    caption = _text(record, columns.caption, video)
    video = checked_text("video path", video.strip(), video)
    caption = checked_caption(caption, video)
    clip_id = posixpath.normpath(video)
    if not allow_absolute and (clip_id.startswith("/") or clip_id.split("/")[0] == ".."):
        raise BadRow("the path leads out of the root folder (see --root and --allow-absolute)", video)
    return Row(line, clip_id, caption)


def _text(record: dict[str, object], column: str, video: str) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        what = "is missing" if column not in record else f"is {type(value).__name__}, not text"
        raise BadRow(f"{column!r} {what}", video)
    return value


def checked_caption(caption: str, video: str = "") -> str:
    """Returns a caption with single spaces.

    Raises:
        BadRow: it is empty, too long, not UTF-8 or holds control characters.
    """
    # Line breaks and tabs are only white space in a caption; other control characters are damage.
    caption = checked_text("caption", " ".join(caption.split()), video)
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise BadRow(f"the caption has {len(caption)} characters, more than {MAX_CAPTION_CHARACTERS}", video)
    return caption


def checked_text(what: str, text: str, video: str = "") -> str:
    """Returns a text.

    Raises:
        BadRow: it is empty, not UTF-8 or holds control characters.
    """
    if not text:
        raise BadRow(f"empty {what}", video)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRow(f"the {what} is not UTF-8", video)
    control = next((character for character in text if unicodedata.category(character) == "Cc"), None)
    if control is not None:
        raise BadRow(f"the {what} holds the control character U+{ord(control):04X}", video)
    return text
