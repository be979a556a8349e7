"""Runs a command again until it is done: for clusters whose scheduler does not restart jobs.

It judges a start by what the ranks on this machine have noted (`outcome.py`) and only then by the command's exit code,
signals all ranks at once, and leaves no process of a start behind.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megacog.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAULT, EXIT_PREEMPTED
from megacog.runtime.outcome import VARIABLE, Outcome, claim, outcomes, reached

_SAME_FAULT = 3
_LONGEST_WAIT = 300.0
_POLL = 0.1
_EXIT_USAGE = 2
_RANK_VARIABLES = (("RANK",), ("OMPI_COMM_WORLD_RANK",), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
"""A process whose environment has all variables of one of these is a rank, if its supervisor's has not."""


@dataclass(frozen=True)
class Verdict:
    """How a start ended: kind is done, stopped (saved; to be continued), refused (never again) or fault."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Start:
    """One start that has ended.

    Attributes:
        verdict: How.
        seconds: It lasted.
        place: From which the next one goes on, as the ranks on this machine say; None = they have not come so far.
    """

    verdict: Verdict
    seconds: float = 0.0
    place: str | None = None


def judge(code: int, found: Sequence[Outcome]) -> Verdict:
    """What to make of an exit code and of what the ranks on this machine have noted."""
    codes = {outcome.code for outcome in found}
    errors = sorted({outcome.error for outcome in found if outcome.error})
    for refusal in (EXIT_CONFIG, _EXIT_USAGE):
        if code == refusal or refusal in codes:
            return Verdict("refused", "; ".join(errors) or f"exit code {refusal}")
    if codes <= {EXIT_DONE} and code == EXIT_DONE:
        return Verdict("done", "")
    if EXIT_PREEMPTED in codes and codes <= {EXIT_DONE, EXIT_PREEMPTED} or (not found and code == EXIT_PREEMPTED):
        return Verdict("stopped", "saved and stopped")
    if errors:
        return Verdict("fault", "; ".join(errors))
    unfinished = sum(outcome.code is None for outcome in found)
    if unfinished:
        return Verdict("fault", f"{unfinished} of {len(found)} processes here did not finish; exit code {code}")
    return Verdict("fault", f"exit code {code}")


def fingerprint(reason: str) -> str:
    """Of a fault: the same for another step, process or address, not for another exit code."""
    return re.sub(r"(exit code -?\d+)|0x[0-9a-f]+|\d+", lambda found: found[1] or "#", reason)


class Supervisor:
    """One command and its starts.

    Args:
        command: What is run.
        max_restarts: Restarts in a row after less than `min_uptime` seconds each.
        min_uptime: Seconds after which restarts are counted from zero. Equal faults are not, since a big model takes
            minutes to load before the same fault comes again: they are after a new checkpoint or shard.
        backoff: Seconds before the first restart after a fault; doubled with every further one in a row.
        leave_seconds: For the processes of a start to end once they should; then they are killed.
    """

    def __init__(
        self, command: Sequence[str], max_restarts: int, min_uptime: float, backoff: float, leave_seconds: float
    ) -> None:
        self._command = list(command)
        self._max_restarts, self._min_uptime = max_restarts, min_uptime
        self._backoff, self._leave_seconds = backoff, leave_seconds
        self._received: list[signal.Signals] = []
        self._passed_on = 0
        """How many of these."""
        self._leave_by: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path()

    def run(self) -> int:
        """Start the command until it is done, refused, hopeless, or this process is told to stop; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)
        restarts, place = 0, None
        faults: list[str] = []
        for count in range(1, sys.maxsize):
            start = self._start(count)
            verdict = start.verdict
            if verdict.kind == "done":
                say("done")
                return EXIT_DONE
            if verdict.kind == "refused":
                say(f"not started again: {verdict.reason}")
                return EXIT_CONFIG
            if self._received:
                say(f"{verdict.reason}; not started again after {self._received[0].name}")
                return EXIT_PREEMPTED if verdict.kind == "stopped" else EXIT_FAULT
            if start.seconds >= self._min_uptime:
                restarts = 0
            if start.place not in (None, place):
                faults, place = [], start.place
            faults = [*faults, fingerprint(verdict.reason)] if verdict.kind == "fault" else []
            if faults and faults[-_SAME_FAULT:].count(faults[-1]) == _SAME_FAULT:
                say(f"given up: the same fault {_SAME_FAULT} times: {verdict.reason}")
                return EXIT_FAULT
            if restarts >= self._max_restarts:
                say(f"given up after {restarts} restarts without {self._min_uptime:g} s of work: {verdict.reason}")
                return EXIT_FAULT
            restarts += 1
            wait = min(self._backoff * 2 ** (len(faults) - 1), _LONGEST_WAIT) if faults else 0.0
            say(f"start {count} ended after {start.seconds:.0f} s: {verdict.reason}; restart {restarts} in {wait:g} s")
            self._sleep(wait)
            if self._received:
                say(f"not started again after {self._received[0].name}")
                return EXIT_FAULT
        raise AssertionError("unreachable")

    def _start(self, number: int) -> Start:
        """Run the command once; how it ended."""
        say(f"start {number}: {shlex.join(self._command)}")
        try:
            folder = tempfile.TemporaryDirectory(prefix="megacog-supervise-", ignore_cleanup_errors=True)
            claim(Path(folder.name))
        except OSError as error:
            reason = f"no temporary folder for what the ranks note: {error.strerror}; free space, or set TMPDIR"
            return Start(Verdict("fault", reason))
        with folder:
            self._folder = Path(folder.name)
            return self._run_command()

    def _run_command(self) -> Start:
        began, self._leave_by = time.monotonic(), None
        try:
            # Its own session: Ctrl-C must reach the ranks by way of this process, not by way of their launchers.
            self._process = subprocess.Popen(
                self._command, env=os.environ | {VARIABLE: str(self._folder)}, start_new_session=True
            )
        except OSError as error:
            return Start(Verdict("refused", f"{self._command[0]}: {error}"))
        while self._process.poll() is None:
            time.sleep(_POLL)
            self._pass_on()
            if self._leave_by is not None and time.monotonic() > self._leave_by:
                self._kill()
        code = self._process.returncode
        self._wait_for_members()
        self._process = None
        verdict = judge(code, list(outcomes(self._folder)))
        return Start(verdict, time.monotonic() - began, reached(self._folder))

    def _wait_for_members(self) -> None:
        """The command has ended; what it has left running may save and leave, and is killed if it does not."""
        deadline = self._leave_by or time.monotonic() + self._leave_seconds
        told = False
        while members := list(self._members()):
            self._pass_on()
            if time.monotonic() > deadline:
                self._kill()
            elif not told and time.monotonic() > deadline - self._leave_seconds + 2:
                told = True
                say(f"the command has ended and {len(members)} of its processes have not: they are told to stop")
                self._signal(signal.SIGTERM)
            time.sleep(_POLL)

    def _kill(self) -> None:
        members = list(self._members())
        if members:
            say(f"{len(members)} processes did not leave within {self._leave_seconds:g} s: killed")
        for pid in members:
            _send(pid, signal.SIGKILL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append(signal.Signals(number))

    def _pass_on(self) -> None:
        """What has been received goes to the ranks: from here, since a signal may come before there is a process."""
        for number in self._received[self._passed_on :]:
            self._passed_on += 1
            self._leave_by = self._leave_by or time.monotonic() + self._leave_seconds
            self._signal(number)

    def _signal(self, number: signal.Signals) -> None:
        """Send it to all ranks here; to the command itself where there are none."""
        ranks = list(self._ranks())
        say(f"{number.name} to " + (f"{len(ranks)} rank{'s' * (len(ranks) > 1)} here" if ranks else "the command"))
        for pid in ranks:
            _send(pid, number)
        if not ranks and self._process is not None:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                pass

    def _members(self) -> Iterator[int]:
        """Living processes of the present start, wherever they are in the tree."""
        mark = f"{VARIABLE}={self._folder}".encode()
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid() and mark in _environment(int(entry)):
                yield int(entry)

    def _ranks(self) -> Iterator[int]:
        """Members that are ranks themselves, not what ranks have started."""
        ours = {name for names in _RANK_VARIABLES for name in names if name in os.environ}
        members = set(self._members())
        ranks = {pid for pid in members if _is_rank(_environment(pid), ours)}
        return (pid for pid in ranks if _parent(pid) not in ranks)

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._received:
            time.sleep(_POLL)


def _is_rank(environment: set[bytes], ours: set[str]) -> bool:
    names = {pair.partition(b"=")[0].decode(errors="replace") for pair in environment}
    return any(names.issuperset(wanted) and not ours.issuperset(wanted) for wanted in _RANK_VARIABLES)


def _environment(pid: int) -> set[bytes]:
    """NAME=value pairs that a process was started with; nothing of one that has ended or belongs to others."""
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} supervise: {text}\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise a command; the exit code: 0 done, 75 refused, 85 saved and told to stop, else 1."""
    parser = argparse.ArgumentParser(
        prog="supervise.py",
        description="Run a command again after every fault until it is done. SIGTERM, SIGINT and SIGUSR1 to this "
        "process go to all ranks on this machine at once; they save and leave.",
    )
    parser.add_argument("--max-restarts", type=int, default=20, metavar="N", help="restarts in a row of short starts")
    parser.add_argument(
        "--min-uptime", type=float, default=300.0, metavar="S",
        help="after a start of so many seconds restarts count from zero again (equal faults: after a new checkpoint)",
    )  # fmt: skip
    parser.add_argument("--backoff", type=float, default=5.0, metavar="S", help="before the first restart; doubles")
    parser.add_argument(
        "--leave-seconds", type=float, default=600.0, metavar="S", help="until processes that should leave are killed"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    arguments = parser.parse_args(argv)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("no COMMAND")
    return Supervisor(
        command, arguments.max_restarts, arguments.min_uptime, arguments.backoff, arguments.leave_seconds
    ).run()
