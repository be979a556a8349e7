"""What a watcher makes of its rank's beats; time is made up."""

from __future__ import annotations

import socket
import time

import pytest

from megacog.runtime.hub import TICK
from megacog.runtime.watcher import RECORD, Watcher


def test_time_in_which_the_watcher_did_not_run_does_not_count_until_the_next_beat() -> None:
    ours, theirs = socket.socketpair()
    record = bytearray(RECORD.size)
    now = time.monotonic()
    watcher = Watcher(0, theirs, memoryview(record), -1, [], 8.0)

    def progress(count: int) -> None:
        RECORD.pack_into(record, 0, count, 7, now, float("inf"), count, b"forward")

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
