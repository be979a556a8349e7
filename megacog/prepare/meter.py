"""Progress of a preparation: clips done, good, failed and frames, as a bar or as plain lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_SECONDS_BETWEEN_LINES = 10.0


class Meter:
    """Counts clips and shows the counts on stderr; a context manager."""

    def __init__(self, total: int, done: int = 0) -> None:
        """Args:
        total: rows of the whole preparation.
        done: rows that an earlier run has finished.
        """
        self.ok = self.failed = self.frames = 0
        self._total, self._before, self._start = total, done, time.monotonic()
        self._last = self._start
        self._bar = None

    def __enter__(self) -> Meter:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total, initial=self._before, desc="preparing", unit="clip", dynamic_ncols=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.ok + self.failed:
            self._write_line()

    def count(self, frames: int) -> None:
        """Counts one clip with this many frames; 0 = it failed."""
        self.add(int(frames > 0), int(frames == 0), frames)

    def add(self, ok: int, failed: int, frames: int) -> None:
        """Counts good clips, failed ones, and frames of the good ones."""
        self.ok += ok
        self.failed += failed
        self.frames += frames
        if self._bar is not None:
            self._bar.set_postfix(ok=self.ok, failed=self.failed, frames=self.frames, refresh=False)
            self._bar.update(ok + failed)
        elif time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._write_line()

    def _write_line(self) -> None:
        self._last = time.monotonic()
        seconds = max(self._last - self._start, 1e-9)
        new = self.ok + self.failed
        done = self._before + new
        left = (self._total - done) * seconds / new
        sys.stderr.write(
            f"preparing: {done}/{self._total} clips ({100 * done / self._total:.0f}%), {self.ok} ok, "
            f"{self.failed} failed, {self.frames} frames, {new / seconds:.1f} clips/s, {left:.0f} s left\n"
        )
        sys.stderr.flush()
