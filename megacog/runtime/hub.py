"""Who is dead, silent or stuck among the ranks of a run: decided in one place from what their watchers tell.

Pure bookkeeping: no sockets, no clock of its own; `watcher.py` feeds it. Standard library only: watchers start without
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megacog.runtime.pauses import Pauses

TICK = 0.5
"""Seconds between two looks of a watcher at its rank."""
GATHER = 0.7
"""Seconds from the first dead or failed rank to the verdict: a node that dies takes several ranks with it."""
GATHER_LONGER = 3.0
"""The same while no cause is known but errors of ranks that have lost another one, or errors that megacog raises, which
most often all ranks raise, each with its own message and exit code."""
JOIN_SECONDS = 60.0
"""Seconds for all ranks, which have met already, to report to the watch."""
_NAMED = 8
"""Ranks that a message names one by one."""


Origin = Literal["peer", "told", "bug"]
"""Where the error of a rank comes from: another one has gone; megacog has raised it with a message; anything else."""


@dataclass(frozen=True)
class Beat:
    """How far a rank has come.

    Attributes:
        count: Beats since the run started. All ranks make the same ones, so the lowest count is furthest behind.
        step: Optimizer step.
        phase: What it does, e.g. "forward".
        limit: Seconds without progress that are too many in this phase.
        age: Seconds since the beat, by the clock of the rank's machine, without those in which its watcher did not run.
        state: Of the process as in /proc: R running, S waiting, D waiting for a device or file, T stopped.
    """

    count: int
    step: int
    phase: str
    limit: float
    age: float
    state: str = "S"

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}" if self.step else self.phase


@dataclass
class Member:
    """What is known of one rank."""

    rank: int
    host: str
    pid: int
    heard: float
    """When its watcher was heard last."""
    beat: Beat = field(default=Beat(0, 0, "start", float("inf"), 0.0))
    left: bool = False
    """It has ended in good order, or is about to."""
    dead: float | None = None
    """Since when."""
    failed: float | None = None
    """Since when it is known to end with an error."""
    error: str = ""
    origin: Origin = "bug"

    @property
    def place(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


@dataclass(frozen=True)
class Verdict:
    """Why the run must end.

    Attributes:
        kind: dead, lost, failed or stuck.
        ranks: The culprits.
        reason: In words, with rank, host, phase and step.
    """

    kind: str
    ranks: tuple[int, ...]
    reason: str


class Hub:
    """Collects what is known of all ranks.

    Args:
        world_size: Ranks of the run; nobody is stuck before all of them are known.
        lost_seconds: A watcher that is silent for longer is lost, with its machine or its network.
        now: Present time in seconds, as for all methods: a monotonic clock.
    """

    def __init__(self, world_size: int, lost_seconds: float, now: float) -> None:
        self.world_size = world_size
        self.members: dict[int, Member] = {}
        self._lost_seconds = lost_seconds
        self._started = now
        self._pauses = Pauses(TICK, now)

    def join(self, rank: int, host: str, pid: int, now: float) -> None:
        """A watcher has reported for the first time."""
        self.members[rank] = Member(rank, host, pid, now)

    def hear(self, rank: int, now: float, beat: Beat | None = None) -> None:
        """A watcher is there; `beat` is what its rank does."""
        member = self.members[rank]
        member.heard = now
        if beat is not None:
            member.beat = beat

    def leave(self, rank: int) -> None:
        """A rank ends in good order."""
        self.members[rank].left = True

    def die(self, rank: int, now: float) -> None:
        """A rank, or its watcher, has gone without a word."""
        member = self.members[rank]
        if not member.left and member.failed is None and member.dead is None:
            member.dead = now

    def fail(self, rank: int, error: str, origin: Origin, now: float) -> None:
        """A rank ends with an error."""
        member = self.members[rank]
        if member.failed is None:
            member.failed, member.error, member.origin = now, error, origin

    def verdict(self, now: float) -> Verdict | None:
        """Why the run must end, as soon as that is certain. Call it every TICK."""
        pause = self._pauses.look(now)
        self._started += pause
        for member in self.members.values():
            member.heard = min(now, member.heard + pause)  # what was not heard meanwhile means nothing
        return self._gone(now) or self._missing(now) or self._silent(now) or self._stuck(now)

    def _gone(self, now: float) -> Verdict | None:
        dead = [member for member in self.members.values() if member.dead is not None]
        failed = [member for member in self.members.values() if member.failed is not None]
        if not dead and not failed:
            return None
        certain = dead or any(member.origin == "bug" for member in failed)
        since = min(moment for member in dead + failed for moment in (member.dead, member.failed) if moment is not None)
        if now - since < (GATHER if certain else GATHER_LONGER):
            return None
        if dead:
            return Verdict("dead", _ranks(dead), f"{_places(dead)} died in {_phases(dead)}")
        causes = [member for member in failed if member.origin != "peer"] or failed
        return Verdict("failed", _ranks(causes), f"{_places(causes)} failed in {_phases(causes)}: {causes[0].error}")

    def _missing(self, now: float) -> Verdict | None:
        missing = sorted(set(range(self.world_size)) - self.members.keys())
        if not missing or now - self._started < JOIN_SECONDS:
            return None
        names = ", ".join(map(str, missing[:_NAMED])) + (", ..." if len(missing) > _NAMED else "")
        return Verdict("lost", tuple(missing), f"rank {names} did not report to the watch within {JOIN_SECONDS:.0f} s")

    def _silent(self, now: float) -> Verdict | None:
        silent = [member for member in self._active() if now - member.heard > self._lost_seconds]
        if not silent:
            return None
        seconds = max(now - member.heard for member in silent)
        reason = f"nothing was heard from {_places(silent)} for {seconds:.0f} s, last in {_phases(silent)}"
        return Verdict("lost", _ranks(silent), reason + ": its machine, its network or its watcher has stopped")

    def _stuck(self, now: float) -> Verdict | None:
        active = self._active()
        if len(self.members) < self.world_size or not active:
            return None
        behind = min(member.beat.count for member in active)
        # Those that are further ahead wait for these, however long that takes.
        last = [member for member in active if member.beat.count == behind]
        # One of these has not come as far as the others of them: only when the most patient limit is over, it is stuck.
        # A halted process is known to be the one.
        halted = [member for member in last if member.beat.state in _HALTED]
        late = [member for member in last if member.beat.age + now - member.heard > member.beat.limit]
        if not late or (len(late) < len(last) and not halted):
            return None
        stuck = halted or late
        seconds = max(member.beat.age + now - member.heard for member in stuck)
        limit = min(member.beat.limit for member in last)
        reason = (
            f"{_places(stuck)} {'is' if len(stuck) == 1 else 'are'} stuck in {_phases(stuck)}: no progress for "
            f"{seconds:.0f} s (limit {limit:.0f} s); {_states(stuck)}"
        )
        others = [member for member in active if member not in stuck]
        if others:
            reason += f"; {len(others)} other rank{'s' * (len(others) > 1)} in {_phases(others)}"
        elif len(active) > 1:
            reason += "; all ranks stand at the same place: look at the network and at the shared disk"
        return Verdict("stuck", _ranks(stuck), reason)

    def _active(self) -> list[Member]:
        return [
            member for member in self.members.values() if not member.left and member.dead is None and not member.failed
        ]


_HALTED = ("T", "t", "Z")
_STATES = {
    "T": "stopped by a signal or a debugger (state T)", "t": "held by a debugger (state t)",
    "D": "waiting for a device or file system (state D)", "R": "computing (state R)", "S": "waiting (state S)",
    "Z": "ended (state Z)",
}  # fmt: skip


def _states(members: Sequence[Member]) -> str:
    states = sorted({member.beat.state for member in members})
    return "the process is " + " or ".join(_STATES.get(state, f"in state {state}") for state in states)


def _ranks(members: Iterable[Member]) -> tuple[int, ...]:
    return tuple(sorted(member.rank for member in members))


def _places(members: Sequence[Member]) -> str:
    ordered = sorted(members, key=lambda member: member.rank)
    text = ", ".join(member.place for member in ordered[:_NAMED])
    return text if len(ordered) <= _NAMED else f"{text} and {len(ordered) - _NAMED} more"


def _phases(members: Iterable[Member]) -> str:
    return " or ".join(sorted({str(member.beat) for member in members}))
