"""Which checkpoints of a run stay, and how the others go."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megacog.checkpoint.commit import check_folder
from megacog.checkpoint.discovery import list_checkpoints, mark
from megacog.checkpoint.manifest import FILE_NAME, Manifest
from megacog.errors import CheckpointError
from megacog.runtime.log import get_logger

log = get_logger(__name__)

BEST = "best"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: each rule for itself, so the best ones may be old."""

    last: int
    """How many of the newest."""
    every: int = 0
    """Those of steps that are multiples of it, for good; 0 = none."""
    best: int = 0
    """How many of those with the lowest evaluation loss."""

    def keeps(self, manifests: Mapping[Path, Manifest]) -> set[Path]:
        """What stays of whole checkpoints, given newest first."""
        newest = list(manifests)[: self.last]
        lasting = [path for path, manifest in manifests.items() if self.every and manifest.step % self.every == 0]
        return {*newest, *lasting, *by_loss(manifests)[: self.best]}


def by_loss(manifests: Mapping[Path, Manifest]) -> list[Path]:
    """Checkpoints that were evaluated, lowest loss first; of equal ones the newest."""
    known = [(m.evaluation_loss, -m.step, path) for path, m in manifests.items() if m.evaluation_loss is not None]
    return [path for *_, path in sorted(known)]


def retire_old(run_dir: Path, retention: Retention, rename: Callable[[Path, Path], None] = os.rename) -> list[Path]:
    """Take away, at once, the checkpoints that need not stay; what is left of them, to be given to `remove_all`.

    Whole checkpoints alone count. A damaged one goes when enough newer ones are whole. What cannot be taken away
    is a warning.
    """
    folders = list_checkpoints(run_dir)
    manifests = {path: manifest for path in folders if (manifest := _manifest_if_whole(path)) is not None}
    if retention.best:
        for path in by_loss(manifests)[:1]:
            mark(path, BEST)
    if len(manifests) < retention.last:
        return []
    oldest_of_last = list(manifests)[retention.last - 1]
    older = folders[folders.index(oldest_of_last) + 1 :]
    kept = retention.keeps(manifests)
    trash = []
    for path in older:
        if path not in kept:
            try:
                trash.append(_retire(path, rename))
            except OSError as error:
                log.warning("old checkpoint %s could not be removed (%s)", path, error)
    return trash


def remove_all(paths: list[Path]) -> None:
    """Remove files and folders that no one needs; a failure is a warning."""
    for path in paths:
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            log.warning("%s could not be removed (%s)", path, error)


def _manifest_if_whole(path: Path) -> Manifest | None:
    try:
        return check_folder(path)
    except CheckpointError:
        return None


def _retire(path: Path, rename: Callable[[Path, Path], None]) -> Path:
    trash = path.with_name(f".{path.name}.trash-{uuid.uuid4().hex[:12]}")
    rename(path, trash)
    (trash / FILE_NAME).unlink(missing_ok=True)
    return trash
