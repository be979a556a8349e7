"""What a supervised process leaves behind, so that its supervisor need not believe the exit code of a launcher.

`deepspeed` ends with 0 when its own child is killed, torchrun with 1 whatever its ranks do. Under launch/supervise.py
every rank on that machine notes its own end, and how far the work has come, in a folder which an environment variable
names; elsewhere nothing happens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "PYTHON_MEGACOG_SUPERVISOR"
"""Names the folder; also marks all processes of one supervisor. Over ssh, also to its own host, DeepSpeed hands on only
variables that begin with PYTHON and the like."""
_PID = "pid"
_PLACE = "place"


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        rank: Of the run, if it had one.
        code: Exit code; None = it has not ended in good order.
        error: What it has said.
    """

    rank: str | None
    code: int | None
    error: str = ""


def note(code: int | None, error: str = "") -> None:
    """Note that this process has started (code None) or ends."""
    _write(f"{os.getpid()}.json", json.dumps({"rank": os.environ.get("RANK"), "code": code, "error": error}))


def reach(place: str) -> None:
    """Note that the next start will go on from here, e.g. from a checkpoint that is complete."""
    _write(_PLACE, place)


def outcomes(folder: Path) -> Iterator[Outcome]:
    """What processes have noted."""
    for path in sorted(folder.glob("*.json")):
        yield Outcome(**json.loads(path.read_text()))


def reached(folder: Path) -> str | None:
    """The last place that a process has noted, if any."""
    try:
        return (folder / _PLACE).read_text()
    except OSError:
        return None


def claim(folder: Path) -> None:
    """Make this process the supervisor of a folder."""
    (folder / _PID).write_text(str(os.getpid()))


def supervisor() -> int | None:
    """Process id of the supervisor, if there is one on this machine."""
    folder = _folder()
    try:
        return int((folder / _PID).read_text()) if folder is not None else None
    except (OSError, ValueError):
        return None


def _write(name: str, text: str) -> None:
    folder = _folder()
    if folder is None:
        return
    try:
        temporary = folder / f"{os.getpid()}.tmp"
        temporary.write_text(text)
        temporary.replace(folder / name)
    except OSError:
        pass  # the exit code is what remains


def _folder() -> Path | None:
    name = os.environ.get(VARIABLE)
    return Path(name) if name and os.path.isdir(name) else None
