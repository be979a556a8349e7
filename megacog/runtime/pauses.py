"""Time in which a process did not run: stopped by a scheduler or a person, or with its machine. Standard library."""

from __future__ import annotations

from collections import deque

_DELAY = 1.0
"""Seconds by which a busy machine may delay a look."""
_KEPT = 256


class Pauses:
    """Notices them by the distance of looks that are made regularly.

    Args:
        period: Seconds between two looks.
        now: Present time in seconds: a monotonic clock.
    """

    def __init__(self, period: float, now: float) -> None:
        self.looked = now
        """When the last look was."""
        self._period = period
        self._found: deque[tuple[float, float]] = deque(maxlen=_KEPT)
        """When they were noticed, and how long they were."""

    def look(self, now: float) -> float:
        """Seconds since the last look in which this process did not run; 0.0 as a rule."""
        lost = now - self.looked - self._period
        self.looked = now
        if lost <= _DELAY:
            return 0.0
        self._found.append((now, lost))
        return lost

    def since(self, moment: float) -> float:
        """Seconds after a moment in which this process did not run."""
        return sum(min(lost, end - moment) for end, lost in self._found if end > moment)
