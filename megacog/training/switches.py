"""What a running job is told by files in its folder: STOP (save, leave, stay away) and SAVE (save, go on)."""

from __future__ import annotations

import time
from pathlib import Path

from megacog.errors import ConfigError
from megacog.runtime.log import get_logger
from megacog.runtime.signals import StopFlag

log = get_logger(__name__)

STOP = "STOP"
SAVE = "SAVE"
_SECONDS = 1.0
"""Between two looks: on a shared disk each is a question to its server."""


def refuse_stopped(run_dir: Path) -> None:
    """Raises:
    ConfigError: The file STOP is there: whoever made it wants no start, and no requeued job may undo that.
    """
    if (run_dir / STOP).exists():
        raise ConfigError(f"{run_dir / STOP} is there, so the run does not start; remove the file to go on")


class Switches:
    """Rank 0's look at the clock and at the run's folder; the other ranks see nothing and follow.

    Args:
        run_dir: The run.
        max_minutes: As `train.max_minutes`.
        stop: Set when the run shall stop.
        rank: This one.
    """

    def __init__(self, run_dir: Path, max_minutes: float | None, stop: StopFlag, rank: int) -> None:
        self._run_dir = run_dir
        self._deadline = None if max_minutes is None else stop.started + 60 * max_minutes
        self._stop = stop
        self._active = rank == 0
        self._looked = -_SECONDS
        self._obeyed: tuple[int, int] | None = None

    def save_requested(self) -> bool:
        """Whether somebody wants a checkpoint of this step; also sets the stop flag where it is due."""
        now = time.monotonic()
        if not self._active or now - self._looked < _SECONDS:
            return False
        self._looked = now
        if self._deadline is not None and now >= self._deadline:
            self._stop.request("train.max_minutes")
        if self._stamp(STOP) is not None:
            self._stop.request(f"the file {self._run_dir / STOP}")
        stamp = self._stamp(SAVE)
        return stamp is not None and stamp != self._obeyed

    def saved(self) -> None:
        """A checkpoint was made: the wish is fulfilled."""
        if not self._active:
            return
        self._obeyed = self._stamp(SAVE)  # where it cannot be removed, it is one wish all the same
        try:
            (self._run_dir / SAVE).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", self._run_dir / SAVE, error)

    def _stamp(self, name: str) -> tuple[int, int] | None:
        try:
            status = (self._run_dir / name).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns
