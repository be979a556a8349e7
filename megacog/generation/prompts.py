"""Prompt files: one prompt per line, plain text or a JSON object.

    the digit 3 moves right
    {"text": "a lion drinks water", "image": "lion.jpg", "seconds": 8, "seed": 7}

Blank lines are skipped. Paths are relative to the file. A line that cannot be used is reported with
its number and does not stop the others; a file that cannot be used at all is an error.
"""

from __future__ import annotations

import difflib
import json
import math
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacog.errors import DataError

KEYS = ("text", "image", "video", "seconds", "seed")
# Far beyond any list of prompts; a video given by mistake is refused before it is read.
_MAX_FILE_BYTES = 64 << 20
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Prompt:
    """What one line asks for; None = as the settings say."""

    line: int
    text: str
    image: Path | None = None
    video: Path | None = None
    seconds: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class BadPrompt:
    """A line that cannot be used, and why."""

    line: int
    text: str
    error: str


def read_prompts(path: Path) -> tuple[list[Prompt], list[BadPrompt]]:
    """The usable prompts and the others of a file, in its order.

    Raises:
        DataError: the file is missing, not UTF-8, or holds no prompt.
    """
    prompts: list[Prompt] = []
    bad: list[BadPrompt] = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        try:
            prompts.append(parse_prompt(line, number, path.parent))
        except DataError as error:
            bad.append(BadPrompt(number, line, f"{path}:{number}: {error}"))
    if not prompts and not bad:
        raise DataError(f"{path} holds no prompt: it is empty. Write one prompt per line.")
    return prompts, bad


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder; expected a text file with one prompt per line")
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise DataError(f"{path} has {size} bytes; a prompt file is a text file of at most {_MAX_FILE_BYTES}")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"prompt file {path} does not exist") from None
    except OSError as error:
        raise DataError(f"prompt file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}). "
            f"Save the file as UTF-8, e.g. `iconv -f LATIN1 -t UTF-8`."
        ) from error


def parse_prompt(line: str, number: int, folder: Path) -> Prompt:
    """The prompt of one stripped, non-empty line; relative paths start at `folder`.

    Raises:
        DataError: the line cannot be used.
    """
    if not line.startswith("{"):
        return Prompt(number, _checked_text(line))
    fields = _json_object(line)
    unknown = [key for key in fields if key not in KEYS]
    if unknown:
        raise DataError("; ".join(_unknown_key(key) for key in unknown))
    if "text" not in fields:
        raise DataError('no "text"; a JSON prompt needs {"text": "..."}')
    if not isinstance(fields["text"], str):
        raise DataError(f'"text" must be a string, not {json.dumps(fields["text"])}')
    if "image" in fields and "video" in fields:
        raise DataError('"image" and "video" cannot be given together; both set the first frames')
    return Prompt(
        number,
        _checked_text(fields["text"]),
        image=_media(fields, "image", folder),
        video=_media(fields, "video", folder),
        seconds=_seconds(fields),
        seed=_seed(fields),
    )


def _json_object(line: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise DataError(f"key {twice[0]!r} is given twice")
        return dict(pairs)

    try:
        fields = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"starts with {{ but is not a JSON object: {error}") from error
    assert isinstance(fields, dict)
    return fields


def _unknown_key(key: str) -> str:
    close = difflib.get_close_matches(key, KEYS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(KEYS)}"
    return f"unknown key {key!r}; {hint}"


def _checked_text(text: str) -> str:
    text = text.strip()
    if not text:
        raise DataError("the text is empty")
    control = [char for char in text if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t"]
    if control:
        raise DataError(f"the text holds a control character ({control[0]!r}); remove it")
    return text


def _media(fields: dict[str, Any], key: str, folder: Path) -> Path | None:
    if key not in fields:
        return None
    value = fields[key]
    if not isinstance(value, str) or not value or "\0" in value:
        raise DataError(f'"{key}" must be a path, not {json.dumps(value)}')
    path = folder / value
    if not path.is_file():
        raise DataError(f"{key} {path} does not exist (paths are relative to the prompt file)")
    return path


def _seconds(fields: dict[str, Any]) -> float | None:
    if "seconds" not in fields:
        return None
    value = fields["seconds"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise DataError(f'"seconds" must be a positive number, not {json.dumps(value)}')
    return float(value)


def _seed(fields: dict[str, Any]) -> int | None:
    if "seed" not in fields:
        return None
    value = fields["seed"]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_SEED:
        raise DataError(f'"seed" must be a whole number from 0 to 2^63 - 1, not {json.dumps(value)}')
    return value
