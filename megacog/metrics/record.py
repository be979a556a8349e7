"""The record of a run: one JSON object per line in metrics.jsonl, and the same numbers in TensorBoard.

The record is a by-product: a full disk or a broken TensorBoard costs a warning, never the training.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megacog.runtime.files import atomic_file
from megacog.runtime.log import get_logger

FILE_NAME = "metrics.jsonl"
_log = get_logger(__name__)


class Recorder:
    """Writes the numbers of a run; on ranks other than 0 it does nothing."""

    def __init__(self, run_dir: Path, rank: int, tensorboard: bool) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self._active = rank == 0
        self._tensorboard: TensorBoardSink | None = None
        self._file: Any = None
        self._warned: set[str] = set()
        if self._active and tensorboard:
            self._tensorboard = TensorBoardSink(Path(run_dir) / "tensorboard")

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Append one record.

        Args:
            step: the optimizer step that it belongs to.
            kind: "train", "eval", "sample", ...
            values: numbers, text, lists or mappings of them; tensors and arrays of one element count as
                numbers. NaN and infinities become the text "nan", "inf", "-inf" (JSON has none).
        """
        if not self._active:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        record = {"step": step, "kind": kind, "time": round(time.time(), 3), **plain}
        self._guard("metrics.jsonl", lambda: self._append(_line(record).encode()))
        sink = self._tensorboard
        if sink is not None:
            self._guard("TensorBoard", lambda: sink.write(step, kind, plain))

    def truncate_after(self, step: int) -> None:
        """Drop, atomically, the records of later steps (a resumed run writes them anew) and torn lines."""
        if not self._active:
            return
        self._close_file()
        if self._tensorboard is not None:
            sink = self._tensorboard
            self._guard("TensorBoard", lambda: sink.purge_after(step))
        self._guard("metrics.jsonl", lambda: _rewrite(self.path, step))

    def close(self) -> None:
        """Flush and close all outputs."""
        self._close_file()
        if self._tensorboard is not None:
            self._guard("TensorBoard", self._tensorboard.close)

    def _append(self, line: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)
            if not _ends_with_newline(self.path):
                line = b"\n" + line  # a killed writer left half a record; it must not swallow this one
        start = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError("short write")
        except OSError:
            os.ftruncate(self._file.fileno(), start)
            raise

    def _close_file(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            self._guard("metrics.jsonl", file.close)

    def _guard(self, what: str, action: Callable[[], None]) -> None:
        """Run an output action; the first failure of each output is a warning, further ones are silent."""
        try:
            action()
        except Exception as error:  # foreign writers fail in many ways, and none may stop a run
            if what not in self._warned:
                self._warned.add(what)
                _log.warning("%s cannot be written (%s); training goes on without it", what, error)


class TensorBoardSink:
    """Scalars `kind/name` in TensorBoard event files, opened at the first record."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._purge_step: int | None = None
        self._writer: Any = None
        self._missing = False

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Write every number of a record; lists become `name_0`, `name_1`, ..., text is left out."""
        if self._missing:
            return
        if self._writer is None:
            self._writer = self._open()
        for name, number in _numbers(values):
            self._writer.add_scalar(f"{kind}/{name}", number, global_step=step)

    def purge_after(self, step: int) -> None:
        """Tell TensorBoard to hide what an earlier process wrote for later steps."""
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self._missing = True
            raise RuntimeError(
                "tensorboard is not installed: `pip install -e .[logging]`, or set metrics.tensorboard=false"
            ) from error
        return SummaryWriter(str(self._folder), purge_step=self._purge_step)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics.jsonl in order, skipping lines that a killed writer left torn."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _rewrite(path: Path, step: int) -> None:
    if not path.exists():
        return
    with atomic_file(path, "w") as new:
        new.writelines(_line(record) for record in read_records(path) if record["step"] <= step)


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # tensors and arrays
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, str) and value in ("nan", "inf", "-inf"):
            yield name, float(value)
        elif isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, list):
            yield from _numbers({f"{name}_{index}": item for index, item in enumerate(value)})
        elif isinstance(value, (int, float)):
            yield name, float(value)
