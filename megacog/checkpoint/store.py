"""Checkpoints of a run: `<run>/checkpoints/step-0001000/`, and what never changes in `<run>/frozen/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from megacog.checkpoint.commit import commit_folder, on_rank_0, rank_and_size, verify_folder
from megacog.checkpoint.discovery import checkpoint_path, mark_latest, remove_old
from megacog.checkpoint.manifest import FILE_NAME, FileEntry, Manifest
from megacog.checkpoint.records import Record, RecordReader, RecordWriter, assign_owners, write_share
from megacog.checkpoint.rng import capture_rng
from megacog.runtime.files import require_space, sha256_file

FROZEN = "frozen"
_RECORD_OVERHEAD = 1 << 10
"""Bytes of a record besides its tensors: entries in the file's header and in the manifest."""
_FOLDER_OVERHEAD = 1 << 16
"""Bytes of a manifest without parameters."""
_RANK_OVERHEAD = 1 << 15
"""Bytes of a rank's generator states and of its files' headers."""


def save_checkpoint(
    run_dir: Path,
    header: Manifest,
    sizes: Mapping[str, int],
    record: Callable[[str], Record],
    keep_last: int,
) -> Path:
    """Write a checkpoint with all ranks, then drop old ones. Collective.

    Args:
        run_dir: The run.
        header: The manifest but for files and parameters.
        sizes: Bytes of every trained parameter's record.
        record: The whole record of one parameter; called on every rank in the order of `sizes`.
        keep_last: Checkpoints to keep.

    Returns:
        The new folder.

    Raises:
        EnvError: There is too little disk space; nothing was written.
        CheckpointError: Some rank could not write; older checkpoints are untouched.
    """
    path = checkpoint_path(run_dir, header.step)
    on_rank_0(lambda: require_space(run_dir, needed_bytes(sizes)))

    def write(folder: Path) -> dict[str, list[str]]:
        rank, _ = rank_and_size()
        generators = RecordWriter(folder, "rng", rank)
        generators.add(rng_name(rank), capture_rng())
        return _write_records(folder, "records", sizes, record) | generators.finish()

    def manifest(files: dict[str, FileEntry], placement: dict[str, str]) -> str:
        return replace(header, files=files, parameters=placement).to_json()

    commit_folder(path, write, manifest)
    on_rank_0(lambda: mark_latest(path))
    if rank_and_size()[0] == 0:
        remove_old(run_dir, keep_last)
    return path


def save_frozen(
    run_dir: Path, header: Manifest, sizes: Mapping[str, int], record: Callable[[str], Record], reserve: int = 0
) -> str:
    """Write the weights that training does not change, once per run; the sha256 of their manifest. Collective.

    Args:
        run_dir: The run.
        header: The manifest but for files and parameters.
        sizes: Bytes of every record.
        record: The record of one weight; called on every rank in the order of `sizes`.
        reserve: Bytes that must be free besides, for what is written next.

    Raises:
        EnvError: There is too little disk space; nothing was written.
        CheckpointError: Some rank could not write.
    """
    path = run_dir / FROZEN
    on_rank_0(lambda: require_space(run_dir, needed_bytes(sizes) + reserve))

    def manifest(files: dict[str, FileEntry], placement: dict[str, str]) -> str:
        return replace(header, files=files, parameters=placement).to_json()

    commit_folder(path, lambda folder: _write_records(folder, FROZEN, sizes, record), manifest)
    return on_rank_0(lambda: sha256_file(path / FILE_NAME))


def open_frozen(run_dir: Path, expected: str) -> RecordReader:
    """The frozen weights that a checkpoint refers to, verified. Collective.

    Raises:
        CheckpointError: Missing, damaged, or not the ones that `expected` (a sha256) names.
    """
    path = run_dir / FROZEN
    return RecordReader(path, verify_folder(path, expected).parameters)


def needed_bytes(sizes: Mapping[str, int]) -> int:
    """Disk space for a folder with records of these sizes, manifest and generator states, rounded up."""
    overhead = _FOLDER_OVERHEAD + rank_and_size()[1] * _RANK_OVERHEAD + len(sizes) * _RECORD_OVERHEAD
    return sum(sizes.values()) + overhead


def rng_name(rank: int) -> str:
    """Under which name a rank's generator states are recorded."""
    return f"rng/{rank:05d}"


def _write_records(
    folder: Path, prefix: str, sizes: Mapping[str, int], record: Callable[[str], Record]
) -> dict[str, list[str]]:
    rank, size = rank_and_size()
    writer = RecordWriter(folder, prefix, rank)
    write_share(writer, list(sizes), assign_owners(sizes, size), rank, record)
    return writer.finish()
