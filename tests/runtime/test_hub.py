"""Who is named when ranks die, fall silent or stand still; time is made up."""

from __future__ import annotations

import pytest

from megacog.runtime.hub import GATHER, GATHER_LONGER, JOIN_SECONDS, TICK, Beat, Hub, Origin, Verdict

LOST = 8.0
LIMIT = 300.0


class Run:
    """Ranks whose watchers report every tick unless told otherwise.

    Args:
        count: Of the last beat of each rank.
    """

    def __init__(self, *count: int) -> None:
        self.now = 1000.0
        self.hub = Hub(len(count), LOST, self.now)
        self.beats = {rank: Beat(number, 7, f"phase{number}", LIMIT, 0.0) for rank, number in enumerate(count)}
        self.since = dict.fromkeys(self.beats, self.now)
        self.silent: set[int] = set()
        for rank in self.beats:
            self.hub.join(rank, f"node{rank // 2}", 100 + rank, self.now)

    def limit(self, rank: int, limit: float, state: str = "S") -> None:
        old = self.beats[rank]
        self.beats[rank] = Beat(old.count, old.step, old.phase, limit, 0.0, state)

    def until(self, seconds: float) -> Verdict | None:
        """The verdict within so many seconds."""
        end = self.now + seconds
        while self.now < end:
            self.now += TICK
            for rank, beat in self.beats.items():
                if rank not in self.silent:
                    age = self.now - self.since[rank]
                    self.hub.hear(rank, self.now, Beat(beat.count, beat.step, beat.phase, beat.limit, age, beat.state))
            verdict = self.hub.verdict(self.now)
            if verdict is not None:
                return verdict
        return None


def test_nobody_is_named_before_the_limit() -> None:
    assert Run(3, 4, 4).until(LIMIT) is None


def test_the_rank_that_is_furthest_behind_is_stuck_and_not_those_that_wait_for_it() -> None:
    run = Run(4, 3, 4)
    verdict = run.until(LIMIT + 2 * TICK)
    assert verdict is not None and (verdict.kind, verdict.ranks) == ("stuck", (1,))
    for word in ("rank 1 on node0 (pid 101)", "phase3 of step 7", "300 s", "2 other ranks in phase4"):
        assert word in verdict.reason


def test_ranks_may_wait_as_long_as_the_one_that_they_wait_for_may_take() -> None:
    run = Run(4, 3)
    run.limit(1, 1800.0)
    assert run.until(1800) is None
    verdict = run.until(2)
    assert verdict is not None and verdict.ranks == (1,)


def test_of_ranks_at_the_same_place_the_most_patient_limit_counts() -> None:
    run = Run(3, 3)
    run.limit(0, 1800.0)  # it compiles, the other one has done so already
    assert run.until(1800) is None
    verdict = run.until(2)
    assert verdict is not None and verdict.ranks == (0, 1) and "network" in verdict.reason


def test_of_ranks_at_the_same_place_a_halted_one_is_named() -> None:
    run = Run(3, 3, 3)
    run.limit(2, 1800.0, state="T")
    verdict = run.until(LIMIT + 2 * TICK)
    assert verdict is not None and verdict.ranks == (2,) and "state T" in verdict.reason


def test_ranks_that_have_left_are_not_waited_for() -> None:
    run = Run(3, 3)
    run.hub.leave(0)
    run.hub.die(0, run.now)
    verdict = run.until(LIMIT + 2 * TICK)
    assert verdict is not None and verdict.ranks == (1,)


def test_dead_ranks_are_named_together() -> None:
    run = Run(3, 3, 4, 4)
    run.hub.die(2, run.now)
    run.hub.die(3, run.now + GATHER / 2)
    assert run.hub.verdict(run.now + GATHER / 2) is None
    verdict = run.until(GATHER + TICK)
    assert verdict is not None and (verdict.kind, verdict.ranks) == ("dead", (2, 3))
    assert "rank 2 on node1 (pid 102), rank 3 on node1 (pid 103) died in phase4 of step 7" in verdict.reason


def test_many_dead_ranks_make_a_short_message() -> None:
    run = Run(*[3] * 40)
    for rank in range(10, 40):
        run.hub.die(rank, run.now)
    verdict = run.until(2)
    assert verdict is not None and len(verdict.ranks) == 30 and "and 22 more" in verdict.reason


@pytest.mark.parametrize(("origin", "seconds"), [("bug", GATHER), ("told", GATHER_LONGER), ("peer", GATHER_LONGER)])
def test_an_error_ends_the_run_after_the_others_had_time_for_theirs(origin: Origin, seconds: float) -> None:
    run = Run(3, 3)
    run.hub.fail(1, "DataError: shard 3", origin, run.now)
    assert run.until(seconds - TICK) is None
    verdict = run.until(2 * TICK)
    assert verdict is not None and (verdict.kind, verdict.ranks) == ("failed", (1,))
    assert "DataError: shard 3" in verdict.reason


def test_the_cause_is_named_and_not_the_errors_that_follow_from_it() -> None:
    run = Run(3, 3, 3)
    run.hub.fail(0, "RuntimeError: Connection closed by peer", "peer", run.now)
    run.hub.fail(2, "DataError: shard 3", "told", run.now + 0.1)
    verdict = run.until(GATHER_LONGER + TICK)
    assert verdict is not None and verdict.ranks == (2,)
    run = Run(3, 3, 3)
    run.hub.fail(0, "RuntimeError: Connection closed by peer", "peer", run.now)
    run.hub.die(1, run.now + 1)
    verdict = run.until(3)
    assert verdict is not None and (verdict.kind, verdict.ranks) == ("dead", (1,))


def test_a_silent_watcher_is_lost() -> None:
    run = Run(3, 3)
    run.silent = {1}
    assert run.until(LOST) is None
    verdict = run.until(2 * TICK)
    assert verdict is not None and (verdict.kind, verdict.ranks) == ("lost", (1,))


def test_silence_while_the_hub_itself_did_not_run_means_nothing() -> None:
    run = Run(3, 3)
    run.now += 60  # it was stopped, and its machine with it
    assert run.hub.verdict(run.now) is None
    assert run.until(LOST - 1) is None


def test_what_is_heard_after_a_pause_is_not_heard_in_the_future() -> None:
    run = Run(3, 3)
    run.now += 60
    run.hub.hear(1, run.now)
    assert run.hub.verdict(run.now) is None
    run.silent = {1}
    verdict = run.until(LOST + 2 * TICK)
    assert verdict is not None and (verdict.kind, verdict.ranks) == ("lost", (1,))


def test_a_rank_that_never_reports_is_named() -> None:
    hub = Hub(3, LOST, 0.0)
    hub.join(0, "a", 1, 0.0)
    hub.join(2, "a", 3, 0.0)
    for second in range(int(JOIN_SECONDS) + 2):
        hub.hear(0, second)
        hub.hear(2, second)
        verdict = hub.verdict(second)
    assert verdict is not None and verdict.ranks == (1,) and "rank 1 did not report" in verdict.reason
