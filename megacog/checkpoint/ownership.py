"""Which process a run folder belongs to: the one that came last.

No clock and no lock decides. A process that starts takes the run over; whatever it finds half-written is of
former processes. One of those that lives on, on a node that lost its network, say, notices when it wants to publish.
"""

from __future__ import annotations

import json
import os
import re
import socket
import uuid
from pathlib import Path

from megacog.errors import CheckpointError
from megacog.runtime.files import atomic_file

FILE_NAME = "owner.json"
_LEFTOVER = re.compile(
    r"\.(step-\d{7,}|latest|best|frozen|export|owner\.json|config\.yaml|command\.txt|metrics\.jsonl)"
    r"\.(tmp|trash)-[0-9a-f]{12}"
)


class TakenOverError(CheckpointError):
    """Another process writes this run now."""


class Ownership:
    """This process's claim to a run folder, made now; on rank 0 only.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        self._id = uuid.uuid4().hex
        with atomic_file(self._path, "w") as file:
            file.write(json.dumps({"id": self._id, "host": socket.gethostname(), "pid": os.getpid()}) + "\n")

    def check(self) -> None:
        """Raises:
        TakenOverError: Another process has taken the run over since.
        CheckpointError: The claim cannot be read.
        """
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            owner = found["id"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{self._path} cannot be read any more ({error}); is the disk there?") from error
        if owner != self._id:
            raise TakenOverError(
                f"process {found.get('pid')} on {found.get('host')} has taken over {self._path.parent}; this one must "
                "not write there any more. Give every run its own train.run_dir"
            )


def leftovers(run_dir: Path) -> list[Path]:
    """Half-written and half-removed things of former owners; to be asked for right after claiming the run."""
    found = []
    for folder in (run_dir, run_dir / "checkpoints"):
        if folder.is_dir():
            found += [path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name)]
    return sorted(found)
