"""`prepare.py records`: token records of the original's data tool to shards. Nothing is coded again.

The original trains on flat files of int32 records without a header: 64 text ids and 5 frames of 20 x 20
codes. Text ids lie above the 20000 image codes. The text is [`<pad>`] rate text `<n>` caption, filled up
with `<pad>`; the leading `<pad>` marks a cut from a longer video and means nothing to the trainer. A
record becomes a clip of 5 frames whose stored rate follows from the span in its rate text, with its text ids
as they are but for `<pad>`: what training sees.

Dimensions: R records, L text ids, T frames, h/w code grid.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from megacog.data.shards import ShardMeta, ShardWriter
from megacog.errors import ConfigError, DataError
from megacog.prepare.meter import Meter
from megacog.prepare.pipeline import Summary, summarize
from megacog.prepare.sources import Failure
from megacog.prepare.state import Part, PartialOutput, SliceRecord, produce
from megacog.runtime.files import require_space, sha256_file
from megacog.tokenizers.frames import FrameTokenizer
from megacog.tokenizers.text import TextTokenizer, rate_text

TEXT_IDS = 64
FRAMES = 5
GRID = (20, 20)
IMAGE_CODES = 20_000
"""Text ids start here."""
VALUES = TEXT_IDS + FRAMES * GRID[0] * GRID[1]
DTYPE = np.dtype("<i4")
RECORD_BYTES = VALUES * DTYPE.itemsize
_BLOCK_RECORDS = 4096


@dataclass(frozen=True)
class RecordSettings:
    """What `prepare_records` is to do.

    Attributes:
        out: folder and stem of the shards.
        clips_per_shard: records per shard.
        eval_fraction: share of the records of every file, its last ones, that go to `<stem>-eval`; 0 = one
            set, `<stem>`. Records of one video stand together, so at most one video is in both sets.
        overwrite: remove what an earlier run left under the stem first.
    """

    out: Path
    clips_per_shard: int = 10_000
    eval_fraction: float = 0.0
    overwrite: bool = False


@dataclass(frozen=True)
class Record:
    """One record, taken apart.

    Attributes:
        span_seconds: from the first to the last frame, as its rate text says.
        text_ids: piece ids of rate text, separator and caption.
        caption: what they say behind the separator.
        codes_Thw: image codes.
    """

    span_seconds: float
    text_ids: list[int]
    caption: str
    codes_Thw: NDArray[np.int32]

    @property
    def fps(self) -> float:
        """Rate of the frames, per second."""
        return (FRAMES - 1) / self.span_seconds


@dataclass(frozen=True)
class _Slice:
    """Consecutive records of a file that make one shard."""

    part: Part
    index: int
    path: Path
    rows: range


def prepare_records(
    files: Sequence[Path], text: TextTokenizer, frames: FrameTokenizer, settings: RecordSettings
) -> Summary:
    """Makes the shards of record files, or finishes making them, and returns what was made.

    Args:
        files: of int32 records, in the order wanted.
        text: vocabulary of the records' text ids (icetk's).
        frames: tokenizer of the records' codes (icetk's at rate 8).
        settings: everything else.

    Raises:
        ConfigError: the tokenizers are not the records', or the output belongs to a run with other settings.
        DataError: a file is missing, no whole number of records, or holds an impossible record.
        EnvError: no disk space.
    """
    start = time.monotonic()
    _check_settings(files, text, frames)
    counts = [count_records(path) for path in files]
    rate_texts = RateTexts(text)
    slices, parts = _plan(files, counts, settings)
    recorded = {
        "records": [[path.name, checked_sha256(path, text.vocab_size)] for path in files],
        "clips_per_shard": settings.clips_per_shard,
        "eval_fraction": settings.eval_fraction,
        "text_tokenizer": text.fingerprint,
        "frame_tokenizer": frames.fingerprint,
    }
    described = {"records": [path.name for path in files], "layout": f"int32, {TEXT_IDS} text ids, {FRAMES} frames"}
    meta = ShardMeta(GRID, IMAGE_CODES, frames.fingerprint, "records, not decoded here", json.dumps(described))

    def make(output: PartialOutput) -> list[Failure]:
        todo = [piece for piece in slices if output.record(piece.part, piece.index) is None]
        left = sum(len(piece.rows) for piece in todo)
        require_space(output.folder, left * FRAMES * meta.frame_bytes)
        with Meter(sum(counts), sum(counts) - left) as meter:
            for piece in todo:
                output.finish_slice(piece.part, piece.index, _make_slice(piece, output, meta, text, rate_texts, meter))
        return []

    manifest, earlier = produce(settings.out, recorded, parts, make, overwrite=settings.overwrite)
    return summarize(settings.out, manifest, start, earlier)


def count_records(path: Path) -> int:
    """Returns how many records a file holds.

    Raises:
        DataError: it is missing, empty, or its size is no multiple of a record.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of records. Correct the path.")
    size = path.stat().st_size
    count, rest = divmod(size, RECORD_BYTES)
    if rest or not count:
        raise DataError(
            f"{path} has {size} bytes, which is not one or more records of {RECORD_BYTES} bytes ({TEXT_IDS} text ids "
            f"and {FRAMES} x {GRID[0]} x {GRID[1]} codes as int32; {rest} bytes too many): truncated, or another "
            "format."
        )
    return count


def checked_sha256(path: Path, vocab_size: int) -> str:
    """Returns the sha256 of a file of records, after checking that every id is possible.

    Raises:
        DataError: an id is not; the message names record and position.
    """
    digest = hashlib.sha256()
    for first, block_RV in _blocks(path):
        digest.update(block_RV.tobytes())
        text_RL, codes_RV = block_RV[:, :TEXT_IDS], block_RV[:, TEXT_IDS:]
        bad_RV = np.concatenate(
            [
                (text_RL < IMAGE_CODES) | (text_RL >= IMAGE_CODES + vocab_size),
                (codes_RV < 0) | (codes_RV >= IMAGE_CODES),
            ],
            axis=1,
        )
        if bad_RV.any():
            row, position = (int(index) for index in np.argwhere(bad_RV)[0])
            _raise_impossible(path, first + row, position, int(block_RV[row, position]), vocab_size)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Yields (number of the first record, records [R, values])."""
    records_RV = np.memmap(path, DTYPE, "r").reshape(-1, VALUES)
    for first in range(0, len(records_RV), _BLOCK_RECORDS):
        yield first, np.asarray(records_RV[first : first + _BLOCK_RECORDS])


def _raise_impossible(path: Path, record: int, position: int, value: int, vocab_size: int) -> NoReturn:
    if position < TEXT_IDS:
        what = f"text id {value}, but text ids are {IMAGE_CODES}..{IMAGE_CODES + vocab_size - 1}"
    else:
        frame, cell = divmod(position - TEXT_IDS, GRID[0] * GRID[1])
        what = f"code {value} in frame {frame}, cell {cell}, but codes are 0..{IMAGE_CODES - 1}"
    raise DataError(
        f"{path}: record {record} holds at position {position} the {what}. The file is damaged, of another format, or "
        "made with another vocabulary."
    )


class RateTexts:
    """Spans of rate texts, however they are spelled: `3秒` and `3.0秒` are 3 seconds."""

    def __init__(self, text: TextTokenizer) -> None:
        """Raises: ConfigError: the tokenizer's rate text does not tell the span."""
        template = text.settings.template
        if "{span}" not in template:
            raise ConfigError(
                f"the text tokenizer's rate template {template!r} has no {{span}}: it is not the records' vocabulary. "
                "Import icetk's (launch/convert.py import-icetk-text)."
            )
        self._pattern = re.compile(r"(\d+(?:\.\d+)?)".join(map(re.escape, template.split("{span}"))))
        self._text = text
        self._known: dict[tuple[int, ...], float] = {}

    def span(self, where: str, ids: Sequence[int]) -> float:
        """Returns the seconds that a rate text tells.

        Raises:
            DataError: it is no rate text.
        """
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = self._parse(where, ids)
        return self._known[key]

    def _parse(self, where: str, ids: Sequence[int]) -> float:
        spelled = self._text.decode(ids)
        found = self._pattern.fullmatch(spelled.strip())
        if found is None or float(found[1]) <= 0:
            raise DataError(
                f"{where}: its text starts with {spelled!r}, not with a rate like "
                f"{rate_text(self._text.settings.template, 4.0)!r}. The file has another format or vocabulary."
            )
        return float(found[1])


def take_apart(where: str, values: NDArray[np.int32], text: TextTokenizer, rates: RateTexts) -> Record:
    """Returns the parts of one record with possible ids.

    Args:
        where: names the record in messages.
        values: of the record, int32 [2064].
        text: vocabulary.
        rates: reads the rate text.

    Raises:
        DataError: it has no separator, no rate, or no caption.
    """
    ids = [token for token in (values[:TEXT_IDS] - IMAGE_CODES).tolist() if token != text.pad_id]
    if text.separator_id not in ids:
        raise DataError(f"{where} has no {text.settings.separator} between rate and caption: another format.")
    cut = ids.index(text.separator_id)
    caption = text.decode(ids[cut + 1 :])
    if not caption.strip():
        raise DataError(f"{where} has no caption. Every clip needs a text; leave the record out.")
    return Record(rates.span(where, ids[:cut]), ids, caption, values[TEXT_IDS:].reshape(FRAMES, *GRID))


def _check_settings(files: Sequence[Path], text: TextTokenizer, frames: FrameTokenizer) -> None:
    if frames.codebook_size != IMAGE_CODES:
        raise ConfigError(
            f"the frame tokenizer has {frames.codebook_size} codes, records are made with icetk's {IMAGE_CODES}. "
            "Import it with launch/convert.py import-icetk-frames."
        )
    names = [path.name for path in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"two files are called {twice[0]}, and the clips' ids come from file names. Rename one, or prepare them "
            "under two --out."
        )


def _plan(
    files: Sequence[Path], counts: Sequence[int], settings: RecordSettings
) -> tuple[list[_Slice], list[Part]]:
    """Returns the slices in the order in which they are made, and the parts that they belong to."""
    held_out = [round(settings.eval_fraction * count) for count in counts]
    rows = {
        "train": [range(count - out) for count, out in zip(counts, held_out, strict=True)],
        "eval": [range(count - out, count) for count, out in zip(counts, held_out, strict=True)],
    }
    if not settings.eval_fraction:
        rows = {"": rows["train"]}
    slices, parts = [], []
    for name, ranges in rows.items():
        cuts = [
            (path, part_rows[first : first + settings.clips_per_shard])
            for path, part_rows in zip(files, ranges, strict=True)
            for first in range(0, len(part_rows), settings.clips_per_shard)
        ]
        stem = settings.out.with_name(f"{settings.out.name}-{name}") if name else settings.out
        parts.append(Part(stem, len(cuts)))
        slices += [_Slice(parts[-1], index, path, piece) for index, (path, piece) in enumerate(cuts)]
    return slices, parts


def _make_slice(
    piece: _Slice, output: PartialOutput, meta: ShardMeta, text: TextTokenizer, rates: RateTexts, meter: Meter
) -> SliceRecord:
    path = output.slice_path(piece.part, piece.index)
    records_RV: NDArray[Any] = np.memmap(piece.path, DTYPE, "r").reshape(-1, VALUES)
    seconds = 0.0
    with ShardWriter(path, meta, text.fingerprint) as writer:
        for number in piece.rows:
            record = take_apart(f"{piece.path}: record {number}", records_RV[number], text, rates)
            writer.add(f"{piece.path.name}:{number}", record.caption, record.codes_Thw, record.fps, record.text_ids)
            seconds += FRAMES / record.fps
            meter.count(FRAMES)
    clips = len(piece.rows)
    return SliceRecord(clips, clips * FRAMES, seconds, path.stat().st_size, sha256_file(path), [])
