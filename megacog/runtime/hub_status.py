"""What the hub knows, in files of the run for people to look at. Standard library only, as `hub.py`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megacog.runtime.hub import Hub, Member

_STATUS_SECONDS = 10.0
_CLOSE_SECONDS = 3.0


class StatusFile:
    """`heartbeat.json` and `heartbeat.log` of the run: written by a thread, since the disk may be what hangs.

    Nothing is written before the first step: until then the folder may be another run's, which this one is refused.

    Args:
        folder: Of the run.
        hub: Whose members are described.
    """

    def __init__(self, folder: Path, hub: Hub) -> None:
        self._folder, self._hub = folder, hub
        self._written = 0.0
        self._thread: threading.Thread | None = None

    def write(self, now: float) -> None:
        """What all ranks do, every few seconds, for people to look at."""
        busy = self._thread is not None and self._thread.is_alive()
        if self._training and not busy and now - self._written >= _STATUS_SECONDS:
            self._written = now
            table = [_row(member, now) for _, member in sorted(self._hub.members.items())]
            text = json.dumps({"time": _clock(), "ranks": table}, indent=1)
            self._start(lambda: self._replace(text))

    def report(self, reason: str, stacks: Mapping[int, str]) -> None:
        """Add why the run has ended, and the stacks, to the log, once what is being written is there."""
        if not self._training:
            return
        parts = [f"{_clock()} {reason}\n"]
        parts += [f"stack of rank {rank}:\n{text}\n" for rank, text in sorted(stacks.items())]
        self._start(lambda: self._append("".join(parts)))

    @property
    def _training(self) -> bool:
        return any(member.beat.step > 0 for member in self._hub.members.values())

    def close(self) -> None:
        """Give the thread a moment to finish."""
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    def _start(self, action: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=_write, args=(action, self._thread), daemon=True)
        self._thread.start()

    def _replace(self, text: str) -> None:
        temporary = self._folder / ".heartbeat.json.tmp"
        temporary.write_text(text + "\n")
        temporary.replace(self._folder / "heartbeat.json")

    def _append(self, text: str) -> None:
        with open(self._folder / "heartbeat.log", "a") as file:
            file.write(text)


def _write(action: Callable[[], None], former: threading.Thread | None) -> None:
    """After the former thread. A full or missing disk must not end a run that is well."""
    if former is not None:
        former.join()
    try:
        action()
    except OSError:
        pass


def _row(member: Member, now: float) -> dict[str, Any]:
    beat = member.beat
    return {
        "rank": member.rank, "host": member.host, "pid": member.pid, "phase": beat.phase, "step": beat.step,
        "beats": beat.count, "seconds_without_progress": round(beat.age + now - member.heard, 1), "left": member.left,
    }  # fmt: skip


def _clock() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
