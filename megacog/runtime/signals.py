"""Stop requests of a scheduler or a person, noticed at the next step boundary.

The handler only sets a flag: saving inside a signal handler gives corrupt checkpoints now and then.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_INTERRUPT = 0.5
"""Seconds in which SIGINTs are one: Ctrl-C reaches a rank from the terminal, and from its launcher, too."""
_INTERRUPT_SECONDS = 2.0
"""For the main thread to notice a second SIGINT; in a collective it cannot."""
_LOOK_SECONDS = 0.05
EXIT_INTERRUPTED = 130


class StopFlag:
    """Context manager in which SIGTERM, SIGINT and SIGUSR1 set `requested` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt, and where that does not end the context soon, exits with code 130. The
    former handlers come back at the end. Must be entered in the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self.started = time.monotonic()
        self.signal_name: str | None = None
        """The first signal that came, e.g. "SIGTERM", or what else was the reason."""
        self.leaving = False
        """Set when all is saved: a second SIGTERM or SIGUSR1 must not spoil the exit code of a process that is on its
        way out. srun sends one to the last ranks as soon as the first has left with a code other than 0."""
        self._interrupted: float | None = None
        """When the first SIGINT came."""
        self._former: dict[signal.Signals, Any] = {}
        self._ended = threading.Event()

    def request(self, reason: str) -> None:
        """Ask for a stop, if nobody has yet.

        Args:
            reason: What the log names: a signal, a file, a limit.
        """
        if not self.requested:
            self.requested, self.signal_name = True, reason

    def wait(self, seconds: float) -> bool:
        """Whether a stop was asked for, or is within so many seconds; returns as soon as it is."""
        end = time.monotonic() + seconds
        while not self.requested and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)  # in pieces: a handler that returns does not cut a sleep short
        return self.requested

    def __enter__(self) -> StopFlag:
        self._ended.clear()
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._write, self._former_wakeup = write, signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._notice_interrupts, args=(read,), name="signals", daemon=True).start()
        for number in _STOP_SIGNALS:
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            # A handler of Python's own would be gone some seconds before the process is.
            ignored = self.leaving and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ignored else handler)
        self._former.clear()
        self._ended.set()
        signal.set_wakeup_fd(self._former_wakeup)
        os.close(self._write)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
            elif now - self._interrupted >= _SAME_INTERRUPT:
                raise KeyboardInterrupt
        self.request(signal.Signals(number).name)

    def _notice_interrupts(self, read: int) -> None:
        """The thread that sees signals while the main thread sits in native code, where no handler of Python runs."""
        first: float | None = None
        while numbers := os.read(read, 64):
            if signal.SIGINT in numbers:
                now = time.monotonic()
                if first is None:
                    first = now
                elif now - first >= _SAME_INTERRUPT and not self._ended.wait(_INTERRUPT_SECONDS):
                    sys.stderr.write("interrupted\n")
                    sys.stderr.flush()
                    os._exit(EXIT_INTERRUPTED)
        os.close(read)
