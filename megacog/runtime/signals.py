"""Stop requests of a scheduler or a person, noticed at the next step boundary.

The handler only sets a flag: saving inside a signal handler gives corrupt checkpoints now and then.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Context manager in which SIGTERM, SIGINT and SIGUSR1 set `requested` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt. The former handlers come back at the end. Must be entered
    in the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal_name: str | None = None
        """The first signal that came, e.g. "SIGTERM"."""
        self.leaving = False
        """Set when all is saved: a second SIGTERM or SIGUSR1 must not spoil the exit code of a process that is on its
        way out. srun sends one to the last ranks as soon as the first has left with a code other than 0."""
        self._interrupts = 0
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            self.signal_name = signal.Signals(number).name
