"""How all ranks write one folder that appears complete or not at all, and how they verify it.

All ranks write into a temporary folder; their outcomes are gathered; only when every rank succeeded
does rank 0 write the manifest, sync, and rename the folder into place. A failure anywhere is the
same CheckpointError everywhere, so no rank waits for one that has left.
"""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megacog.checkpoint.manifest import FILE_NAME, FileEntry, Manifest, check_contents, check_sizes, read_manifest
from megacog.errors import CheckpointError, MegacogError
from megacog.runtime.files import environment_error, sha256_file, sync_directory

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """This rank and how many there are; (0, 1) without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def on_rank_0(action: Callable[[], T]) -> T:
    """The result of an action that only rank 0 runs.

    Raises:
        MegacogError: It failed; the same on every rank. An OSError becomes an EnvError or CheckpointError.
    """
    rank, size = rank_and_size()
    outcome: list[tuple[T | None, MegacogError | None]] = [(None, None)]
    if rank == 0:
        try:
            outcome = [(action(), None)]
        except MegacogError as error:
            outcome = [(None, error)]
        except OSError as error:
            outcome = [(None, environment_error(error) or CheckpointError(str(error)))]
    if size > 1:
        dist.broadcast_object_list(outcome, src=0)
    result, problem = outcome[0]
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]


def on_all_ranks(action: Callable[[], T]) -> list[T]:
    """Every rank's result, in rank order. The action must not be collective itself beyond what it survives.

    Raises:
        CheckpointError: It failed somewhere; the same on every rank, naming the rank and its host.
    """
    rank, size = rank_and_size()
    mine: tuple[T | None, str | None]
    try:
        mine = (action(), None)
    except (OSError, MegacogError) as error:
        mendable = environment_error(error) if isinstance(error, OSError) else None
        mine = (None, f"rank {rank} on {socket.gethostname()}: {mendable or error}")
    outcomes: list[tuple[T | None, str | None]] = [mine]
    if size > 1:
        outcomes = [(None, None)] * size
        dist.all_gather_object(outcomes, mine)
    problems = [problem for _, problem in outcomes if problem is not None]
    if problems:
        raise CheckpointError("; ".join(problems))
    return [result for result, _ in outcomes]  # type: ignore[misc]


def commit_folder(
    final: Path,
    write: Callable[[Path], dict[str, list[str]]],
    manifest: Callable[[dict[str, FileEntry], dict[str, str]], str],
) -> None:
    """Write a folder with all ranks. Collective.

    Args:
        final: Its name; an existing folder of that name is replaced.
        write: Writes this rank's files into the folder it is given; parameters by file name.
        manifest: Text of manifest.json from all files and the placement of all parameters.

    Raises:
        CheckpointError: Some rank failed; `final` is as it was before.
    """
    try:
        temporary = on_rank_0(lambda: _make_temporary(final))
    except MegacogError as error:
        raise CheckpointError(f"{final} could not be written: {error}") from error
    try:
        shares = on_all_ranks(lambda: _write_share(temporary, write))
        on_rank_0(lambda: _publish(temporary, final, shares, manifest))
    except MegacogError as error:
        if rank_and_size()[0] == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{final} could not be written: {error}") from error


def verify_folder(path: Path, sha256: str | None = None) -> Manifest:
    """The manifest of a committed folder, all of whose files are whole. Collective.

    Sizes are checked by rank 0, checksums by all ranks in shares.

    Args:
        path: The folder.
        sha256: Of the manifest that the folder must have; None = any.

    Raises:
        CheckpointError: It is missing, damaged, or another one; the same on every rank.
    """

    def read() -> Manifest:
        manifest = read_manifest(path)
        if sha256 is not None and sha256_file(path / FILE_NAME) != sha256:
            raise CheckpointError(f"{path} is not the {path.name} folder that the checkpoint was written with")
        check_sizes(path, manifest.files)
        return manifest

    manifest = on_rank_0(read)
    rank, size = rank_and_size()
    share = dict(sorted(manifest.files.items())[rank::size])
    on_all_ranks(lambda: check_contents(path, share))
    return manifest


def _make_temporary(final: Path) -> Path:
    temporary = final.with_name(f".{final.name}.tmp-{uuid.uuid4().hex[:12]}")
    temporary.mkdir(parents=True)
    return temporary


def _write_share(
    folder: Path, write: Callable[[Path], dict[str, list[str]]]
) -> tuple[dict[str, FileEntry], dict[str, str]]:
    files = write(folder)
    for name in files:
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    entries = {name: FileEntry.of(folder / name) for name in files}
    return entries, {parameter: name for name, parameters in files.items() for parameter in parameters}


def _publish(
    temporary: Path,
    final: Path,
    shares: list[tuple[dict[str, FileEntry], dict[str, str]]],
    manifest: Callable[[dict[str, FileEntry], dict[str, str]], str],
) -> None:
    entries: dict[str, FileEntry] = {}
    placement: dict[str, str] = {}
    for files, parameters in shares:
        entries.update(files)
        placement.update(parameters)
    with open(temporary / FILE_NAME, "w", encoding="utf-8") as file:
        file.write(manifest(entries, placement))
        file.flush()
        os.fsync(file.fileno())
    sync_directory(temporary)
    trash = None
    if final.exists():  # a folder cannot be renamed over another one
        trash = final.with_name(f".{final.name}.trash-{uuid.uuid4().hex[:12]}")
        os.rename(final, trash)
    os.rename(temporary, final)
    sync_directory(final.parent)
    if trash is not None:
        shutil.rmtree(trash, ignore_errors=True)
