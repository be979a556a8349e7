"""manifest.json: what a checkpoint (or the frozen folder of a run) holds, with sizes and checksums."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megacog.errors import CheckpointError
from megacog.runtime.files import crc32_file

FORMAT = "megacog-checkpoint"
VERSION = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """Size and checksum of one file."""

    bytes: int
    crc32: int

    @staticmethod
    def of(path: Path) -> FileEntry:
        return FileEntry(path.stat().st_size, crc32_file(path))


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but the tensors."""

    step: int
    samples: int
    """Samples consumed, over all ranks."""
    config: dict[str, Any]
    config_hash: str
    world: dict[str, int]
    """ranks, tensor, data: sizes of the run that wrote it."""
    fingerprints: dict[str, str]
    """Of the text and frame tokenizers."""
    versions: dict[str, str]
    frozen: str | None
    """sha256 of the run's frozen/manifest.json; None when nothing is frozen."""
    parameters: dict[str, str]
    """Parameter -> file."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    evaluation_loss: float | None = None
    """Of the evaluation at this step, if there was one."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard of the losses remembers."""

    def to_json(self) -> str:
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        checked = json.dumps(content, indent=1, sort_keys=True)
        content["crc32"] = zlib.crc32(checked.encode())
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: Missing, damaged or of another format.
    """
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        crc32 = content.pop("crc32", None)
        if crc32 != zlib.crc32(json.dumps(content, indent=1, sort_keys=True).encode()):
            raise ValueError("checksum differs")
        found = (content.pop("format"), content.pop("version"))
        if found != (FORMAT, VERSION):
            raise CheckpointError(f"{path} is {found[0]} version {found[1]}; this megacog reads {FORMAT} {VERSION}")
        files = {name: FileEntry(**entry) for name, entry in content.pop("files").items()}
        return Manifest(files=files, **content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error


def check_sizes(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Raises:
    CheckpointError: A listed file is missing or has another size.
    """
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry.bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {entry.bytes}")


def check_contents(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Raises:
    CheckpointError: A listed file does not have its checksum.
    """
    for name, entry in files.items():
        try:
            actual = crc32_file(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read ({error.strerror})") from error
        if actual != entry.crc32:
            raise CheckpointError(f"{folder / name} is damaged: its checksum differs from the manifest's")
