"""Writing the checkpoints of a run: `<run>/checkpoints/step-0001000/`.

Asynchronous: every rank takes hold of its share and trains on, while a thread copies, writes and syncs it. What lies in
the host's memory is copied by the thread, too: nothing changes it until the optimizer's next update, which waits for
the copy. (Threads are enough: copying, writing, syncing and checksums run without python's lock.) Collectives belong to
the main thread alone, so it is the main threads that agree, at a later step, that all shares are on disk; then a
thread of rank 0 publishes the checkpoint, and at a later step still all ranks are told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from megacog.checkpoint.commit import (
    Share,
    begin_folder,
    gather_shares,
    on_rank_0,
    publish_folder,
    rank_and_size,
    write_share,
)
from megacog.checkpoint.discovery import LATEST, checkpoint_path, mark
from megacog.checkpoint.manifest import Manifest
from megacog.checkpoint.ownership import Ownership, leftovers
from megacog.checkpoint.records import Record, RecordWriter, Snapshot, assign_owners, build_share, copied
from megacog.checkpoint.retention import Retention, remove_all, retire_old
from megacog.checkpoint.rng import capture_rng
from megacog.checkpoint.store import needed_bytes, rng_name
from megacog.errors import EnvError
from megacog.runtime.faults import fault_point
from megacog.runtime.files import require_space
from megacog.runtime.log import get_logger

log = get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete, and what it took."""

    path: Path
    step: int
    bytes: int
    """Of all ranks' files."""
    seconds: float
    """From its step to its name."""
    stall_seconds: float
    """Of these, how long training stood still."""


class _Task(Generic[T]):
    """Work and what came of it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._done = threading.Event()
        self._outcome: list[T] = []
        self._error: Exception | None = None

    @property
    def busy(self) -> bool:
        return not self._done.is_set()

    def result(self) -> T:
        """Wait for the work; raises what kept it from being done."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._outcome[0]

    def run(self) -> None:
        try:
            self._outcome.append(self._work())
        except Exception as error:  # told by `result`, when all ranks ask
            self._error = error
        finally:
            self._done.set()


class _Worker:
    """One thread for all tasks, as starting one means waiting for it; it does not keep the process from leaving."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task[Any]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="checkpoint-writer").start()

    def take(self, task: _Task[Any]) -> None:
        self._tasks.put(task)

    def _work(self) -> None:
        while True:
            self._tasks.get().run()


@dataclass
class _InFlight:
    """A checkpoint in the making: shares, then, once all ranks have theirs, its publication."""

    header: Manifest
    path: Path
    temporary: Path
    share: _Task[Share]
    started: float
    stalled: float
    bytes: int = 0
    shared: bool = False
    """All ranks have written."""
    publication: _Task[float] | None = None
    """On rank 0: when it was complete."""

    @property
    def busy(self) -> bool:
        return self.share.busy or (self.publication is not None and self.publication.busy)


class Saver:
    """Writes a run's checkpoints, at most one at a time; takes the run folder over. All methods are collective.

    Args:
        run_dir: The run.
        retention: Which checkpoints stay.
        asynchronous: Train on while files are written; costs each rank host memory for its share, `share_bytes`.

    Raises:
        MegacogError: The run folder cannot be written.
    """

    def __init__(self, run_dir: Path, retention: Retention, asynchronous: bool) -> None:
        self._run_dir = run_dir
        self._retention = retention
        self._asynchronous = asynchronous
        self._worker = _Worker() if asynchronous else None
        self._snapshot = Snapshot()
        self._copied = threading.Event()
        self._copied.set()
        self._in_flight: _InFlight | None = None
        self._removal: threading.Thread | None = None
        self._ownership: Ownership | None = None
        on_rank_0(self._take_over)

    @property
    def writing(self) -> bool:
        """Whether this rank still writes; when no rank does, all call `advance`. Not collective."""
        return self._in_flight is not None and self._in_flight.busy

    def start(self, header: Manifest, sizes: Mapping[str, int], record: Callable[[str], Record]) -> None:
        """Begin a checkpoint; `finish` completes it. None may have begun before.

        Args:
            header: The manifest but for files and parameters.
            sizes: Bytes of every trained parameter's record.
            record: The whole record of one parameter; called on every rank in the order of `sizes`.

        Raises:
            EnvError: There is too little disk space; nothing was written.
            TakenOverError: The run belongs to another process now.
            CheckpointError: The folder cannot be made.
        """
        assert self._in_flight is None, "one checkpoint at a time"
        started = time.monotonic()
        needed = needed_bytes(sizes)
        on_rank_0(lambda: self._check_place(needed))
        path = checkpoint_path(self._run_dir, header.step)
        temporary = begin_folder(path)
        rank, size = rank_and_size()
        owners = assign_owners(sizes, size)
        mine = needed_bytes({name: sizes[name] for name in sizes if owners[name] == rank})
        generators = capture_rng()
        if self._asynchronous:
            build_share(list(sizes), owners, rank, record, self._snapshot.add)
            self._snapshot.wait_for_device()
            self._copied.clear()

        def write(folder: Path) -> dict[str, list[str]]:
            writer = RecordWriter(folder, "records", rank)
            if self._asynchronous:
                for name, held in self._snapshot.records.items():
                    writer.add(name, held)
            else:
                build_share(list(sizes), owners, rank, record, lambda name, r: writer.add(name, copied(r)))
            files = writer.finish()
            fault_point("save", header.step)
            own = RecordWriter(folder, "rng", rank)
            own.add(rng_name(rank), generators)
            return files | own.finish()

        def copy_and_write() -> Share:
            try:
                self._snapshot.copy()
            finally:
                self._copied.set()
            return write_share(temporary, write, mine)

        share = self._begin(copy_and_write)
        self._in_flight = _InFlight(header, path, temporary, share, started, time.monotonic() - started)

    def _begin(self, work: Callable[[], T]) -> _Task[T]:
        """Have work done in the background, or now."""
        task = _Task(work)
        if self._worker is not None:
            self._worker.take(task)
        else:
            task.run()
        return task

    def wait_for_copy(self) -> None:
        """Wait until weights and optimizer states may change. Not collective."""
        if self._in_flight is not None and not self._copied.is_set():
            waiting = time.monotonic()
            self._copied.wait()
            self._in_flight.stalled += time.monotonic() - waiting

    def advance(self) -> Saved | None:
        """Go on with the checkpoint that was begun, when no rank is `writing`; what it was, if it is complete now.

        Raises:
            TakenOverError: The run belongs to another process now.
            CheckpointError: Some rank could not write; older checkpoints are untouched.
        """
        begun, self._in_flight = self._in_flight, None
        if begun is None:
            return None
        resumed = time.monotonic()
        if not begun.shared:
            self._share(begun)
            begun.stalled += time.monotonic() - resumed
            self._in_flight = begun
            return None
        publication = begun.publication
        seconds = on_rank_0(lambda: publication.result() - begun.started if publication is not None else 0.0)
        stalled = begun.stalled + time.monotonic() - resumed
        return Saved(begun.path, begun.header.step, begun.bytes, seconds, stalled)

    def finish(self) -> Saved | None:
        """Complete the checkpoint that was begun, waiting for what is not written yet; None if none was.

        Raises:
            MegacogError: As `advance`.
        """
        saved = None
        while self._in_flight is not None:
            saved = self.advance()
        return saved

    def _share(self, begun: _InFlight) -> None:
        """Agree that all shares are on disk, and let rank 0 publish them."""
        share = gather_shares(begun.temporary, begun.path, begun.share.result)
        begun.shared, begun.bytes = True, share.bytes
        if rank_and_size()[0] == 0:
            manifest = replace(begun.header, files=share.files, parameters=share.parameters)
            work = partial(self._publish, begun.temporary, begun.path, manifest)
            begun.publication = self._begin(work)

    def _publish(self, temporary: Path, path: Path, manifest: Manifest) -> float:
        """When the checkpoint was complete."""
        assert self._ownership is not None
        self._ownership.check()
        publish_folder(temporary, path, manifest.to_json())
        complete = time.monotonic()
        mark(path, LATEST)
        self._remove(retire_old(self._run_dir, self._retention))
        return complete

    def close(self) -> None:
        """Remove old checkpoints, those too that a former process did not come to, and wait for it. Not collective."""
        if rank_and_size()[0] == 0:
            self._remove(retire_old(self._run_dir, self._retention))
        self._wait_for_removal()

    def _take_over(self) -> None:
        self._ownership = Ownership(self._run_dir)
        old = leftovers(self._run_dir)
        for path in old:
            log.warning("%s is what a former process left unfinished; it is removed", path)
        self._remove(old)

    def _check_place(self, needed: int) -> None:
        assert self._ownership is not None
        self._ownership.check()
        try:
            require_space(self._run_dir, needed)
        except EnvError:
            self._wait_for_removal()
            require_space(self._run_dir, needed)

    def _remove(self, paths: list[Path]) -> None:
        """Remove files and folders while training goes on."""
        self._wait_for_removal()
        if paths:
            self._removal = threading.Thread(target=remove_all, args=(paths,), daemon=True)
            self._removal.start()

    def _wait_for_removal(self) -> None:
        if self._removal is not None:
            self._removal.join()
            self._removal = None


def share_bytes(sizes: Mapping[str, int], ranks: int) -> int:
    """Host memory of the rank with the largest share, in an asynchronous save, given the bytes of every record."""
    shares = [0] * ranks
    for name, rank in assign_owners(sizes, ranks).items():
        shares[rank] += sizes[name]
    return max(shares)
