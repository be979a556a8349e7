"""What a run keeps besides checkpoints, in `<run>/frozen/`, and how much space records take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from megacog.checkpoint.commit import (
    begin_folder,
    gather_shares,
    on_rank_0,
    publish_folder,
    rank_and_size,
    verify_folder,
    write_share,
)
from megacog.checkpoint.manifest import FILE_NAME, Manifest
from megacog.checkpoint.records import Record, RecordReader, RecordWriter, assign_owners, build_share, copied
from megacog.runtime.files import require_space, sha256_file

FROZEN = "frozen"
_RECORD_OVERHEAD = 1 << 10
"""Bytes of a record besides its tensors: entries in the file's header and in the manifest."""
_FOLDER_OVERHEAD = 1 << 16
"""Bytes of a manifest without parameters."""
_RANK_OVERHEAD = 1 << 15
"""Bytes of a rank's generator states and of its files' headers."""


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
    temporary = begin_folder(path)
    rank, size = rank_and_size()

    def write(folder: Path) -> dict[str, list[str]]:
        writer = RecordWriter(folder, FROZEN, rank)
        build_share(list(sizes), assign_owners(sizes, size), rank, record, lambda name, r: writer.add(name, copied(r)))
        return writer.finish()

    share = gather_shares(temporary, path, lambda: write_share(temporary, write, needed_bytes(sizes)))
    manifest = replace(header, files=share.files, parameters=share.parameters)

    def publish() -> str:
        publish_folder(temporary, path, manifest.to_json())
        return sha256_file(path / FILE_NAME)

    return on_rank_0(publish)


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

