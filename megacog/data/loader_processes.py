"""Processes that make numbered items for this one, and are replaced when they die or hang.

Which process made an item, and how often it was tried, shows nowhere: an item is a function of its number.
"""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import signal
import socket
import struct
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from megacog.errors import EnvError
from megacog.runtime.log import get_logger
from megacog.runtime.processes import die_with

log = get_logger(__name__)

Note = Callable[[str], None]
"""Takes down what is being read, for the message if it never comes back."""

_NOTE_BYTES = 4096
_RESTART_EVERY = 1000
"""Items between two restarts of a process: it may be killed now and then in a run of weeks, but not by each sample."""
_END_SECONDS = 5.0


class LoaderProcesses(Iterator[Any]):
    """Items 0, 1, 2, ... without end, in order, made by several processes.

    Process w of n makes the items w, w + n, ..., as far ahead as its socket has room. They are forked: they share what
    is open and loaded here, and are to use neither tensors nor devices.

    Args:
        make: item of a number; called in the processes, with a place to note what is read.
        count: processes.
        timeout: seconds without an item that is due after which its process counts as hung.
    """

    def __init__(self, make: Callable[[int, Note], Any], count: int, timeout: float) -> None:
        self._make, self._timeout = make, timeout
        self._next = 0
        self._restarted: dict[int, int] = {}  # process -> item at which it was replaced last
        self._workers: list[_Worker] = []
        # Also at exit. Processes forked for something else have a copy of this object and are to leave them alone.
        self._end_workers = weakref.finalize(self, _end_workers, self._workers, os.getpid())
        for worker in range(count):
            self._workers.append(self._start(worker, count))

    def __next__(self) -> Any:
        """Returns the next item.

        Raises:
            EnvError: its process died or hung for the second time; the message says what it was reading.
            RuntimeError: `make` failed; with the traceback of the process.
        """
        if not self._workers:
            raise StopIteration
        while True:
            number = self._next % len(self._workers)
            worker = self._workers[number]
            try:
                failure, item = worker.connection.recv()
                break
            except BlockingIOError:
                self._replace(number, f"gave nothing for {self._timeout:g} s (data.worker_timeout)")
            except (EOFError, OSError):
                self._replace(number, f"died ({worker.end()})")
        if failure is not None:
            self.close()
            raise RuntimeError(f"a loader process failed{worker.reading()}:\n{failure}")
        self._next += 1
        return item

    def close(self) -> None:
        """Ends the processes."""
        self._end_workers()

    def _replace(self, number: int, problem: str) -> None:
        worker = self._workers[number]
        worker.end()
        problem = f"a loader process {problem}{worker.reading()}"
        last = self._restarted.get(number)
        if last is not None and self._next - last < _RESTART_EVERY:
            self.close()
            raise EnvError(
                f"{problem}, and so did the one before it. Look at that file and its disk, and at the machine's memory "
                "(lower data.workers); data.workers=0 loads in the training process."
            )
        log.warning("%s; it is replaced, with the same samples", problem)
        self._restarted[number] = self._next
        self._workers[number] = self._start(self._next, len(self._workers))

    def _start(self, first: int, step: int) -> _Worker:
        ours, theirs = _connect(self._timeout)
        note = mmap.mmap(-1, _NOTE_BYTES)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                gc.freeze()  # what belongs to threads of the parent, as gloo's, must not be collected without them
                for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                    signal.signal(name, signal.SIG_IGN)  # signals are for the training process
                die_with(parent)
                for connection in (ours, *(worker.connection for worker in self._workers)):
                    connection.close()
                _serve(self._make, first, step, theirs, note)
            finally:
                os._exit(1)
        theirs.close()
        return _Worker(pid, ours, note)


class _Worker:
    """The parent's end of one process."""

    def __init__(self, pid: int, connection: Connection, note: mmap.mmap) -> None:
        self.pid, self.connection, self._note = pid, connection, note
        self._ending: str | None = None

    def reading(self) -> str:
        """Returns ` while reading ...`, or nothing when it read nothing."""
        text = self._note[:].split(b"\0", 1)[0].decode("utf-8", "replace")
        return f" while reading {text}" if text else ""

    def end(self) -> str:
        """Kills the process and returns how it ended."""
        if self._ending is not None:
            return self._ending
        self.connection.close()
        try:
            os.kill(self.pid, signal.SIGKILL)
            self._ending = self._wait()
        except (ProcessLookupError, ChildProcessError):
            self._ending = "somebody else took its exit code"
        return self._ending

    def _wait(self) -> str:
        """A process in a system call of a dead file server cannot be killed: it is not waited for without end."""
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            time.sleep(0.002)
        return "it cannot be killed: the file system does not answer"


def _end_workers(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:
        for worker in workers:
            worker.end()
    workers.clear()


def _connect(timeout: float) -> tuple[Connection, Connection]:
    """Returns two ends of a socket; reads of the first one fail with BlockingIOError after so many seconds.

    The limit is the socket's own because a process can stop in the middle of an item.
    """
    ours, theirs = socket.socketpair()
    seconds, fraction = divmod(timeout, 1)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(1e6 * fraction)))
    return Connection(ours.detach()), Connection(theirs.detach())


def _serve(make: Callable[[int, Note], Any], first: int, step: int, connection: Connection, note: mmap.mmap) -> None:
    """Sends (None, item) of first, first + step, ...; or, at an error that is no item, (traceback, None)."""

    def write_note(text: str) -> None:
        raw = text.encode("utf-8", "replace")[: _NOTE_BYTES - 1] + b"\0"
        note[: len(raw)] = raw

    for number in itertools.count(first, step):
        try:
            item = make(number, write_note)
        except Exception:
            connection.send((traceback.format_exc(), None))
            return
        write_note("")
        connection.send((None, item))
