"""Records of parameters in safetensors files, written in shares by all ranks.

A record is what one parameter needs: fields (`weight`, `master`, `exp_avg`, ...) of whole tensors,
stored under `<field>/<parameter>`. No format depends on how many ranks wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacog.errors import CheckpointError
from megacog.runtime.tensor_files import save_tensors

Record = dict[str, Tensor]
"""Whole tensors by field name."""

_FILE_BYTES = 2 * 2**30


def assign_owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank writes which parameter, so that all write about as much: a pure function of the sizes in bytes."""
    load = [0] * ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(range(ranks), key=lambda rank: (load[rank], rank))
        owners[name] = rank
        load[rank] += sizes[name]
    return owners


class RecordWriter:
    """Writes this rank's share of records into files of limited size.

    An error while writing is kept and raised by `finish`: the other ranks are in collectives that
    this rank must go on taking part in.

    Args:
        folder: Where the files go.
        prefix: Start of every file name.
        rank: This rank.
    """

    def __init__(self, folder: Path, prefix: str, rank: int, file_bytes: int = _FILE_BYTES) -> None:
        self._stem = f"{prefix}-{rank:05d}"
        self._folder = folder
        self._limit = file_bytes
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._error: Exception | None = None
        self.files: dict[str, list[str]] = {}
        """File name -> parameters in it."""

    def add(self, name: str, record: Record) -> None:
        """Queue one record, whose tensors must not change before `finish`."""
        if self._error is not None:
            return
        for field, tensor in record.items():
            self._pending[f"{field}/{name}"] = tensor
            self._bytes += tensor.nbytes
        if self._bytes >= self._limit:
            self._flush()

    def finish(self) -> dict[str, list[str]]:
        """Write what is queued; the parameters by file name.

        Raises:
            OSError: A file could not be written (now or earlier).
        """
        if self._pending and self._error is None:
            self._flush()
        if self._error is not None:
            raise self._error
        return self.files

    def _flush(self) -> None:
        name = f"{self._stem}-{len(self.files):02d}.safetensors"
        try:
            save_tensors(self._pending, self._folder / name)
            self.files[name] = sorted({key.partition("/")[2] for key in self._pending})
        except OSError as error:
            self._error = error
        self._pending, self._bytes = {}, 0


class RecordReader:
    """Reads records of a folder, one at a time.

    Args:
        folder: Holds the files.
        placement: Parameter -> file name.
    """

    def __init__(self, folder: Path, placement: Mapping[str, str]) -> None:
        self.folder = folder
        self.placement = placement

    def read(self, name: str) -> Record:
        """The record of one parameter.

        Raises:
            CheckpointError: The parameter or its file is missing or damaged.
        """
        if name not in self.placement:
            raise CheckpointError(f"{self.folder} holds no parameter {name}")
        path = self.folder / self.placement[name]
        try:
            with safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if key.partition("/")[2] == name]
                return {key.partition("/")[0]: file.get_tensor(key) for key in keys}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from error


class Snapshot:
    """Records in host memory, which training does not change while they are being written.

    The memory is kept for the next snapshot. For tensors of a GPU it is pinned: copies run at the speed of the bus.
    Tensors of the host are copied later, by any thread: until then they must not change.
    """

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self._uncopied: list[tuple[Tensor, Tensor]] = []
        """Buffers, and what they are to hold."""

    def add(self, name: str, record: Record) -> None:
        """Take one record; copied only after `wait_for_device` and `copy`."""
        held = self.records.setdefault(name, {})
        for field, tensor in record.items():
            buffer = held.get(field)
            if buffer is None or (buffer.dtype, buffer.shape) != (tensor.dtype, tensor.shape):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                held[field] = buffer
            if tensor.is_cuda:
                buffer.copy_(tensor, non_blocking=True)
            else:
                self._uncopied.append((buffer, tensor.detach()))

    def wait_for_device(self) -> None:
        """Wait until tensors of a GPU are copied."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def copy(self) -> None:
        """Copy the tensors of the host."""
        uncopied, self._uncopied = self._uncopied, []
        for buffer, tensor in uncopied:
            buffer.copy_(tensor)


def copied(record: Record) -> Record:
    """A copy on the CPU."""
    return {field: tensor.detach().to("cpu", copy=True).contiguous() for field, tensor in record.items()}


def build_share(
    names: Sequence[str],
    owners: Mapping[str, int],
    rank: int,
    record: Callable[[str], Record],
    take: Callable[[str, Record], None],
) -> None:
    """Build all records (collectively, in the order of `names`) and hand those that this rank owns to `take`."""
    for name in names:
        with torch.no_grad():
            built = record(name)
            if owners[name] == rank:
                take(name, built)
