"""Where the checkpoints of a run are, and which one it continues from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from megacog.checkpoint.commit import on_rank_0, rank_and_size, verify_folder
from megacog.checkpoint.manifest import Manifest
from megacog.errors import CheckpointError, EnvError
from megacog.runtime.files import atomic_file
from megacog.runtime.log import get_logger

log = get_logger(__name__)

_NAME = re.compile(r"step-(\d{7,})")
LATEST = "latest"


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return checkpoints_folder(run_dir) / f"step-{step:07d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete and incomplete checkpoint folders, newest step first; temporary ones are ignored."""
    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def find_checkpoint(run_dir: Path, resume: Literal["auto", "must", "never"]) -> tuple[Path, Manifest] | None:
    """The newest undamaged checkpoint of a run, or None to start from step 0. Collective.

    A damaged checkpoint is named in the log and the one before it is taken; when all are damaged that is
    an error, never a silent restart.

    Raises:
        CheckpointError: `must` and there is none, `never` and there is one, or none is usable.
    """
    candidates = on_rank_0(lambda: list_checkpoints(run_dir))
    if not candidates:
        if resume == "must":
            raise CheckpointError(
                f"train.resume is `must`, but {checkpoints_folder(run_dir)} holds no checkpoint; "
                "check train.run_dir, or use `auto` to start anew"
            )
        return None
    if resume == "never":
        raise CheckpointError(
            f"train.resume is `never`, but {candidates[0]} exists; use another train.run_dir, or `auto` to continue"
        )
    problems = []
    for path in candidates:
        try:
            return path, verify_folder(path)
        except CheckpointError as error:
            problems.append(f"{path.name}: {error}")
            if rank_and_size()[0] == 0:
                log.warning("checkpoint %s cannot be used: %s; trying the one before", path, error)
    raise CheckpointError(
        "no checkpoint of this run can be used: " + "; ".join(problems) + ". Restore one from a copy, "
        "or start anew in another train.run_dir"
    )


def mark(path: Path, hint: str) -> None:
    """Replace the hint `latest` or `best`, which only people read; a failure is a warning."""
    try:
        with atomic_file(path.parent / hint, "w") as file:
            file.write(path.name + "\n")
    except (OSError, EnvError) as error:
        log.warning("%s could not be written (%s)", path.parent / hint, error)
