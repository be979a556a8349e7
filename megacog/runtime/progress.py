"""Progress of long loops: a bar on a terminal, plain lines in a log file, nothing on other ranks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 10.0


def progress(iterable: Iterable[T], total: int | None = None, desc: str = "") -> Iterator[T]:
    """Return an iterator over the same items that shows how far it is on stderr.

    Args:
        iterable: the items.
        total: how many there will be; taken from len() if None, unknown if there is none.
        desc: what is being done, e.g. "encoding clips".
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if int(os.environ.get("RANK", "0")) != 0:
        return iter(iterable)
    if sys.stderr.isatty():
        return _bar(iterable, total, desc)
    return _lines(iterable, total, desc)


def _bar(iterable: Iterable[T], total: int | None, desc: str) -> Iterator[T]:
    from tqdm import tqdm

    with tqdm(iterable, total=total, desc=desc, dynamic_ncols=True) as bar:
        yield from bar


def _lines(iterable: Iterable[T], total: int | None, desc: str) -> Iterator[T]:
    start = last = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            _write_line(_describe(done, total, now - start, desc))
    _write_line(f"{desc}: {done} in {time.monotonic() - start:.1f} s")


def _describe(done: int, total: int | None, seconds: float, desc: str) -> str:
    rate = done / max(seconds, 1e-9)
    if total is None:
        return f"{desc}: {done} ({rate:.1f}/s)"
    remaining = max(total - done, 0) / rate
    return f"{desc}: {done}/{total} ({100 * done / max(total, 1):.0f}%, {rate:.1f}/s, {remaining:.0f} s left)"


def _write_line(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
