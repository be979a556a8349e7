"""Faults of loader processes, at the reads of clips that a test names."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Container
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megacog.data.shards import Shard


def children() -> set[int]:
    """Process ids of this process's living forks: loader processes. A run's watcher is a program of its own."""
    pids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    own = command_line(os.getpid())
    return {int(pid) for pid in pids if command_line(int(pid)) == own}


def command_line(pid: int) -> bytes:
    """Empty for one that has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def misbehave(
    monkeypatch: pytest.MonkeyPatch, folder: Path, fault: Callable[[], object], reads: Container[int]
) -> None:
    """Let loader processes fall into a fault before these reads of a clip, counted over all of them."""
    read, parent = Shard.read, os.getpid()

    def faulty(self: Shard, clip: int, indices: Any) -> Any:
        if os.getpid() != parent and claim_number(folder) in reads:
            fault()
        return read(self, clip, indices)

    def claim_number(folder: Path) -> int:
        for number in itertools.count():
            with suppress(FileExistsError):
                (folder / f"read-{number}").touch(exist_ok=False)
                return number
        raise AssertionError

    monkeypatch.setattr(Shard, "read", faulty)


def kill() -> None:
    """What the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """What a file server does that no longer answers."""
    os.kill(os.getpid(), signal.SIGSTOP)
