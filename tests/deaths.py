"""A process that dies right after its k-th write, sync, rename, creation or removal of a file or folder."""

from __future__ import annotations

import builtins
import os
import threading
from collections.abc import Callable
from typing import Any

_OPERATIONS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")
_CODE = 77


class _Counter:
    """Counts operations of all threads, and tells `after` the number of each; what it does itself does not count."""

    def __init__(self, after: Callable[[int], object]) -> None:
        self.count = 0
        self._after = after
        self._telling = False
        self._lock = threading.RLock()

    def add(self) -> None:
        with self._lock:
            if self._telling:
                return
            self.count += 1
            self._telling = True
            try:
                self._after(self.count)
            finally:
                self._telling = False

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            result = call(*arguments, **named)
            self.add()
            return result

        return watched

    def watched_open(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            opened = call(file, mode, *arguments, **named)
            if "w" not in mode:
                return opened
            self.add()
            return _Watched(opened, self)

        return watched


class _Watched:
    """A file whose writes count."""

    def __init__(self, file: Any, counter: _Counter) -> None:
        self._file = file
        self._counter = counter

    def write(self, data: Any) -> int:
        count = self._file.write(data)
        self._file.flush()  # so that a death leaves what was written
        self._counter.add()
        return count

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def count_operations(work: Callable[[], object], after: Callable[[int], object] = lambda number: None) -> int:
    """How many operations `work` has, counted in this process.

    Args:
        work: Is done.
        after: Called after each operation with its number, from 1, while all threads that would write wait.
    """
    counter = _Counter(after)
    before = {name: getattr(os, name) for name in _OPERATIONS}, builtins.open
    _install(counter)
    try:
        work()
    finally:
        for name, call in before[0].items():
            setattr(os, name, call)
        builtins.open = before[1]
    return counter.count


def die_after(last: int, work: Callable[[], object]) -> None:
    """Do `work` in a child process that dies right after operation `last`."""
    child = os.fork()
    if child == 0:
        try:
            arm(last)
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == _CODE, f"operation {last} was not reached"


def arm(last: int) -> None:
    """This process dies right after its operation `last` from now on."""
    _install(_Counter(lambda number: os._exit(_CODE) if number == last else None))


def _install(counter: _Counter) -> None:
    for name in _OPERATIONS:
        setattr(os, name, counter.watched(getattr(os, name)))
    builtins.open = counter.watched_open(builtins.open)  # type: ignore[assignment]
