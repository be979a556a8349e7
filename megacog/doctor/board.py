"""What the ranks of a job tell each other while some of them may be missing, stuck or dead."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_POLL_SECONDS = 0.1
_FAREWELL_SECONDS = 5.0


@dataclass(frozen=True)
class Board:
    """Notes in the job's key-value store, which rank 0 keeps and collects: no collective, nobody waits for the dead."""

    store: dist.Store
    rank: int
    seconds: float
    """How long rank 0 waits for a note."""

    def gather(self, name: str, note: Any, ranks: Iterable[int]) -> dict[int, Any]:
        """Leave a note and return those of all these ranks that left one in time; the same on all, rank 0's.

        Args:
            name: Of the subject, each used once.
            note: Values of JSON.
            ranks: Of whom a note is expected; this rank and rank 0 are among them.
        """
        self.store.set(f"{name}/{self.rank}", json.dumps(note))
        if self.rank == 0:
            self.store.set(name, json.dumps(self._collect(name, list(ranks))))
        else:
            self.store.wait([name], timedelta(seconds=2 * self.seconds + 30))
        return {int(rank): found for rank, found in json.loads(self.store.get(name)).items()}

    def _collect(self, name: str, waiting: list[int]) -> dict[int, Any]:
        deadline, found = time.monotonic() + self.seconds, {}
        while True:
            late = time.monotonic() > deadline  # before the last look
            for rank in [rank for rank in waiting if self.store.check([f"{name}/{rank}"])]:
                found[rank] = json.loads(self.store.get(f"{name}/{rank}"))
                waiting.remove(rank)
            if late or not waiting:
                return found
            time.sleep(_POLL_SECONDS)

    def leave(self, ranks: Iterable[int]) -> None:
        """Say farewell. Rank 0 takes the store with it, so it waits a moment until the others have read all."""
        if self.rank:
            self.store.set(f"left/{self.rank}", "")
            return
        deadline = time.monotonic() + _FAREWELL_SECONDS
        others = [f"left/{rank}" for rank in ranks if rank]
        while others and not self.store.check(others) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
