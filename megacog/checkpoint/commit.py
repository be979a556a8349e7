"""How all ranks write one folder that appears complete or not at all, and how they verify it.

All ranks write into a temporary folder; their outcomes are gathered; only when every rank succeeded
does rank 0 write the manifest, sync, and rename the folder into place. A failure anywhere is the
same CheckpointError everywhere, so no rank waits for one that has left.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megacog.checkpoint.manifest import FILE_NAME, FileEntry, Manifest, check_contents, check_sizes, read_manifest
from megacog.errors import CheckpointError, EnvError, MegacogError
from megacog.runtime.files import environment_error, sha256_file, sync_directory, sync_file

T = TypeVar("T")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Share:
    """What one rank, or all of them, have written into a folder."""

    files: dict[str, FileEntry]
    parameters: dict[str, str]
    """Parameter -> file."""

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())


def rank_and_size() -> tuple[int, int]:
    """This rank and how many there are; (0, 1) without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def on_rank_0(action: Callable[[], T]) -> T:
    """The result of an action that only rank 0 runs.

    Raises:
        MegacogError: It failed; the same on every rank. An OSError becomes an EnvError or CheckpointError.
        Exception: Any other one on rank 0 itself; elsewhere it is a CheckpointError.
    """
    rank, size = rank_and_size()
    own: Exception | None = None
    outcome: list[tuple[T | None, MegacogError | None]] = [(None, None)]
    if rank == 0:
        try:
            outcome = [(action(), None)]
        except MegacogError as error:
            outcome = [(None, error)]
        except OSError as error:
            outcome = [(None, environment_error(error) or CheckpointError(str(error)))]
        except Exception as error:  # the others wait for an outcome, whatever it is
            own, outcome = error, [(None, CheckpointError(_unexpected(error, rank)))]
    if size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if own is not None:
        raise own
    result, problem = outcome[0]
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]


def on_all_ranks(action: Callable[[], T]) -> list[T]:
    """Every rank's result, in rank order. The action must not be collective itself beyond what it survives.

    Raises:
        CheckpointError: It failed somewhere; the same on every rank, naming the rank and its host.
        Exception: Any but an OSError or a MegacogError, on the rank that raised it.
    """
    rank, size = rank_and_size()
    own: Exception | None = None
    mine: tuple[T | None, str | None]
    try:
        mine = (action(), None)
    except (OSError, MegacogError) as error:
        mendable = environment_error(error) if isinstance(error, OSError) else None
        mine = (None, f"rank {rank} on {socket.gethostname()}: {mendable or error}")
    except Exception as error:
        own, mine = error, (None, _unexpected(error, rank))
    outcomes: list[tuple[T | None, str | None]] = [mine]
    if size > 1:
        outcomes = [(None, None)] * size
        dist.all_gather_object(outcomes, mine)
    if own is not None:
        raise own
    problems = [problem for _, problem in outcomes if problem is not None]
    if problems:
        raise CheckpointError("; ".join(problems))
    return [result for result, _ in outcomes]  # type: ignore[misc]


def _unexpected(error: Exception, rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()}: {type(error).__name__}: {error}"


def begin_folder(final: Path) -> Path:
    """A new temporary folder, the same on all ranks, that is to become `final`. Collective.

    Raises:
        CheckpointError: It cannot be made.
    """
    try:
        return on_rank_0(lambda: _make_temporary(final))
    except MegacogError as error:
        raise CheckpointError(f"{final} could not be written: {error}") from error


def write_share(folder: Path, write: Callable[[Path], dict[str, list[str]]], needed: int) -> Share:
    """Write this rank's files and sync them. Not collective: any thread may do it.

    Args:
        folder: As `begin_folder` gave.
        write: Writes the files into the folder it is given; parameters by file name.
        needed: Bytes that this rank is about to write, for the message when they do not fit.

    Raises:
        EnvError: The disk is full.
        OSError: A file cannot be written or synced otherwise.
    """
    try:
        files = write(folder)
        for name in files:
            sync_file(folder / name)
        entries = {name: FileEntry.of(folder / name) for name in files}
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise EnvError(_no_space(error, folder, needed)) from error
    return Share(entries, {parameter: name for name, parameters in files.items() for parameter in parameters})


def gather_shares(temporary: Path, final: Path, share: Callable[[], Share]) -> Share:
    """What all ranks have written into a temporary folder, once all have. Collective.

    Args:
        temporary: As `begin_folder` gave; removed if some rank failed.
        final: What it is to become.
        share: Gives this rank's share, or raises what kept it from being written.

    Raises:
        CheckpointError: Some rank failed.
    """
    try:
        shares = on_all_ranks(share)
    except CheckpointError as error:
        if rank_and_size()[0] == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{final} could not be written: {error}") from error
    files, parameters = {}, {}
    for one in shares:
        files.update(one.files)
        parameters.update(one.parameters)
    return Share(files, parameters)


def publish_folder(temporary: Path, final: Path, manifest: str) -> None:
    """Let a temporary folder that all ranks have written become `final`. On rank 0, in any thread.

    Args:
        temporary: As `begin_folder` gave; removed if it cannot be published.
        final: Its name; an existing folder of that name is replaced.
        manifest: Text of manifest.json.

    Raises:
        CheckpointError: It could not be written; `final` is as it was before.
    """
    try:
        _publish(temporary, final, manifest)
    except (OSError, MegacogError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        mendable = environment_error(error) if isinstance(error, OSError) else None
        raise CheckpointError(f"{final} could not be written: {mendable or error}") from error


def verify_folder(path: Path, sha256: str | None = None) -> Manifest:
    """The manifest of a committed folder, all of whose files are whole. Collective.

    Sizes are checked by rank 0, checksums by all ranks in shares.

    Args:
        path: The folder.
        sha256: Of the manifest that the folder must have; None = any.

    Raises:
        CheckpointError: It is missing, damaged, or another one; the same on every rank.
    """

    manifest = on_rank_0(lambda: check_folder(path, sha256))
    rank, size = rank_and_size()
    share = dict(sorted(manifest.files.items())[rank::size])
    on_all_ranks(lambda: check_contents(path, share))
    return manifest


def check_folder(path: Path, sha256: str | None = None) -> Manifest:
    """The manifest of a committed folder, whose files are all there and as long as they should be.

    Raises:
        CheckpointError: See `verify_folder`.
    """
    manifest = read_manifest(path)
    if sha256 is not None and sha256_file(path / FILE_NAME) != sha256:
        raise CheckpointError(f"{path} is not the {path.name} folder that the checkpoint was written with")
    check_sizes(path, manifest.files)
    return manifest


def _make_temporary(final: Path) -> Path:
    temporary = final.with_name(f".{final.name}.tmp-{uuid.uuid4().hex[:12]}")
    temporary.mkdir(parents=True)
    return temporary


def _no_space(error: OSError, folder: Path, needed: int) -> str:
    assert error.errno is not None
    try:
        free = f"{shutil.disk_usage(folder).free} bytes free"
    except OSError:
        free = "free bytes unknown"
    return (
        f"{error.filename or folder}: {os.strerror(error.errno)} ({errno.errorcode[error.errno]}): "
        f"{needed} bytes needed by this rank, {free}. Free some space and run again"
    )


def _publish(temporary: Path, final: Path, manifest: str) -> None:
    try:
        (temporary / FILE_NAME).write_text(manifest, encoding="utf-8")
        sync_file(temporary / FILE_NAME)
        sync_directory(temporary)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise EnvError(f"rank 0 on {socket.gethostname()}: {_no_space(error, temporary, len(manifest))}") from error
    trash = None
    if final.exists():  # a folder cannot be renamed over another one
        trash = final.with_name(f".{final.name}.trash-{uuid.uuid4().hex[:12]}")
        os.rename(final, trash)
    os.rename(temporary, final)
    sync_directory(final.parent)
    if trash is not None:
        shutil.rmtree(trash, ignore_errors=True)
