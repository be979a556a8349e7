"""Whether everything that a run has written is whole: checkpoints, frozen weights, export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megacog.checkpoint.commit import check_folder
from megacog.checkpoint.discovery import checkpoints_folder, list_checkpoints
from megacog.checkpoint.export import open_export
from megacog.checkpoint.manifest import FILE_NAME, Manifest, check_contents
from megacog.checkpoint.ownership import leftovers
from megacog.checkpoint.store import FROZEN
from megacog.errors import MegacogError
from megacog.runtime.files import sha256_file

EXPORT = "export"
_COMMAND = "command.txt"
"""What a run writes before anything else."""


@dataclass(frozen=True)
class Finding:
    """One thing that a run has written."""

    name: str
    """Relative to the run."""
    files: int
    bytes: int
    note: str
    problem: str | None = None
    """What is wrong with it."""


def is_run(path: Path) -> bool:
    """Whether a folder holds checkpoints, frozen weights or an export, or is of a run that has begun."""
    written = (path / _COMMAND, path / FROZEN / FILE_NAME, path / EXPORT / FILE_NAME)
    return checkpoints_folder(path).is_dir() or any(file.is_file() for file in written)


def verify_run(run_dir: Path, full: bool) -> list[Finding]:
    """What a run holds, newest checkpoint first; on one rank.

    Args:
        run_dir: The run; nothing in it is changed.
        full: Read every byte and compare checksums; else manifests and sizes alone.
    """
    found = [_finding(run_dir, path, partial(_checkpoint, run_dir, path, full)) for path in _folders(run_dir)]
    export = run_dir / EXPORT
    if export.exists():
        found.append(_finding(run_dir, export, partial(_export, export, full)))
    return found + [
        Finding(str(path.relative_to(run_dir)), *_held(path), "unfinished; the next start of the run removes it")
        for path in leftovers(run_dir)
    ]


def _folders(run_dir: Path) -> list[Path]:
    frozen = run_dir / FROZEN
    return list_checkpoints(run_dir) + ([frozen] if frozen.exists() else [])


def _finding(run_dir: Path, path: Path, check: Callable[[], str]) -> Finding:
    name = str(path.relative_to(run_dir))
    try:
        return Finding(name, *_held(path), check())
    except (OSError, MegacogError) as error:
        return Finding(name, *_held(path), "", str(error))


def _checkpoint(run_dir: Path, path: Path, full: bool) -> str:
    manifest = check_folder(path)
    if full:
        check_contents(path, manifest.files)
    if path.name == FROZEN:
        return f"{len(manifest.parameters)} tensors"
    if manifest.frozen is not None:
        _check_reference(run_dir / FROZEN, manifest.frozen)
    return _describe(manifest)


def _check_reference(frozen: Path, sha256: str) -> None:
    if not (frozen / FILE_NAME).is_file():
        raise MegacogError(f"it refers to {frozen}, which is missing")
    if sha256_file(frozen / FILE_NAME) != sha256:
        raise MegacogError(f"{frozen} does not hold the frozen weights that it was written with")


def _describe(manifest: Manifest) -> str:
    loss = "" if manifest.evaluation_loss is None else f", evaluation loss {manifest.evaluation_loss:.4f}"
    return f"{manifest.samples} samples, {manifest.world['ranks']} ranks{loss}"


def _export(path: Path, full: bool) -> str:
    return f"{len(open_export(path, verify=full).files)} tensors"


def _held(path: Path) -> tuple[int, int]:
    """Files and bytes of a file or folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return len(files), sum(file.stat().st_size for file in files)
