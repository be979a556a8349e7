"""The JSON file that describes a tokenizer folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megacog.errors import DataError


def read_description(path: Path, kind: str) -> dict[str, Any]:
    """Returns the object in `path`; `kind` (text, frame) says what the folder should be.

    Raises:
        DataError: the file is missing or damaged.
    """
    command = {"text": "text", "frame": "frames"}[kind]
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; is {path.parent} a {kind} tokenizer folder "
            f"(launch/train_tokenizer.py {command})?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); the file is damaged") from error
    if not isinstance(stored, dict):
        raise DataError(f"{path}: not a JSON object; the file is damaged")
    return stored
