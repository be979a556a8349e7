"""What a watcher makes of its rank's beats; time is made up."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from megacog.runtime.heartbeat import Limits, Watch
from megacog.runtime.hub import TICK
from megacog.runtime.ranks import Ranks
from megacog.runtime.watcher import RECORD_BYTES, Watcher, pack_beat


def test_time_in_which_the_watcher_did_not_run_does_not_count_until_the_next_beat() -> None:
    ours, theirs = socket.socketpair()
    record = bytearray(RECORD_BYTES)
    now = time.monotonic()
    watcher = Watcher(0, theirs, memoryview(record), -1, [], 8.0)

    def progress(count: int) -> None:
        record[:] = pack_beat(count, 7, now, float("inf"), "forward")

    def age(seconds: float) -> float:
        """After looks for so many seconds."""
        nonlocal now
        end = now + seconds
        while now < end:
            now += TICK
            watcher._look(now)
        beat = watcher._beat(now)
        assert beat is not None
        return beat.age

    with ours, theirs:
        progress(1)
        assert age(10) == pytest.approx(10)
        now += 400  # all are stopped, and continued
        assert age(TICK) == pytest.approx(10 + 2 * TICK, abs=TICK)
        assert age(10) == pytest.approx(20, abs=2 * TICK)
        now += 400
        progress(2)  # by a rank that is continued before its watcher
        assert age(10) == pytest.approx(10, abs=2 * TICK)
        progress(3)  # and at once all are stopped again
        now += 400
        assert age(10) == pytest.approx(10, abs=2 * TICK)


def test_a_beat_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    watch = Watch(Ranks(0, 1, 0, 1, "single process"), Limits(step=123.0, start=123.0), tmp_path)
    watch.beat("forward", 7)
    with ours, theirs:
        watcher = Watcher(0, theirs, memoryview(watch._memory), -1, [], 8.0)
        writer = os.fork()
        if writer == 0:
            while True:
                watch.beat("forward", 7)
        try:
            found, deadline = 0, time.monotonic() + 60
            while found < 100_000 and time.monotonic() < deadline:
                beat = watcher._beat(time.monotonic())
                if beat is not None:
                    assert (beat.step, beat.phase, beat.limit) == (7, "forward", 123.0) and beat.age < 60, beat
                    found += 1
        finally:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
    assert found > 1000


def test_memory_in_which_no_beat_was_written_is_no_beat() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, mmap.mmap(-1, RECORD_BYTES) as memory:
        assert Watcher(0, theirs, memoryview(bytes(memory)), -1, [], 8.0)._beat(time.monotonic()) is None
