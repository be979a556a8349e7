"""How long a run needs to end after a fault or a signal: `python -m megacog.training.fault_times --config X`.

Trains the configuration again and again on forked ranks of this machine, with a fault injected by rank, phase and kind,
or SIGTERM to a rank at a random moment, and measures from the fault to the end of the last process. Prints one JSON
object per case and one with the quantiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megacog.checkpoint.discovery import find_checkpoint
from megacog.config.load import load_config
from megacog.metrics.record import FILE_NAME, read_records
from megacog.runtime.cli import run
from megacog.runtime.faults import KINDS, PHASES, VARIABLE
from megacog.runtime.ranks import free_port
from megacog.training import pretrain
from megacog.training.soak_ranks import ForkedRanks

_LONGEST = 120.0
_LAST = 5000
"""Characters of a failed run's output that are worth showing."""
_STEP = 3
"""Of the fault: kernels and caches have been used before."""
SIGNAL = "signal"
"""The kind of a case without a fault: SIGTERM to a rank, in any phase."""


class NeverCameError(RuntimeError):
    """The run ended before its fault: the machine held it up for longer than the watch allows."""


@dataclass(frozen=True)
class Case:
    """One fault and what followed.

    Attributes:
        kind, phase, rank: Of the fault.
        limit: Seconds without progress that the phase is allowed; 0 if the rank is killed, which is seen at once. Of a
            signal: the seconds of that run's last step and last save.
        codes: Exit codes of the ranks; negative = ended by that signal.
        seconds: From the fault to the end of all processes of the run, orphans included.
        orphans: Processes that were still there afterwards.
        named: Whether the output names the rank, its host and the phase. Of a signal: whether the newest checkpoint,
            whole, is of the step that the run was in or of the one after it, and nothing was trained beyond.
        output: Of all ranks.
    """

    kind: str
    phase: str
    rank: int
    limit: float
    codes: list[int]
    seconds: float
    orphans: int
    named: bool
    output: str = field(repr=False)


def measure(config: Path, ranks: int, kind: str, phase: str, rank: int, limit: float) -> Case:
    """Train until the fault has ended the run.

    Args:
        config: Of a run that saves and evaluates in step 3; its run_dir is replaced by a temporary one.
        ranks: How many.
        kind: kill or stop.
        phase: Of megacog.runtime.faults.
        rank: That it hits.
        limit: Seconds without progress that are allowed to stopped ranks, three times as many when loading: other
            phases of a start, in which python reads its packages, have the same. Killed ones need no limit, and none
            then ends a run that other work on the machine has held up.

    Raises:
        NeverCameError: With the end of the run's output.
    """
    if kind != "stop":
        limit, limits = 0.0, {}
    elif phase == "load":
        limit *= 3
        limits = {"start_seconds": limit}
    else:
        limits = {"step_seconds": limit, "slow_seconds": limit}
    with tempfile.TemporaryDirectory(prefix="megacog-fault-") as temporary:
        folder = Path(temporary)
        settings = [f"watch.{key}={seconds}" for key, seconds in limits.items()]
        # Else the fault comes in a thread, while training is in another phase.
        settings.append("checkpoint.asynchronous=false")
        arguments = ["--config", str(config), *settings, f"train.run_dir={folder / 'run'}"]
        if phase == "load":  # which needs something to load
            codes, *_ = run_forked_ranks([*arguments, f"train.steps={_STEP}"], ranks, folder, "")
            if any(codes):
                raise RuntimeError((folder / "output").read_text()[-_LAST:])
            shutil.rmtree(folder / "run/export")
        came = folder / "came"
        step = "" if phase == "load" else f"step:{_STEP},"
        fault = f"rank:{rank},{step}phase:{phase},kind:{kind},once:{came}"
        codes, ended, orphans = run_forked_ranks(arguments, ranks, folder, fault)
        output = (folder / "output").read_text()
        if not came.exists():
            raise NeverCameError(f"the fault {fault} never came:\n{output[-_LAST:]}")
        seconds = ended - came.stat().st_mtime
    place = f"rank {rank} on {socket.gethostname()}"
    named = any(place in line and phase in line for line in output.splitlines() if "WATCH" in line)
    return Case(kind, phase, rank, limit, codes, round(seconds, 2), orphans, named, output)


def measure_signal(config: Path, ranks: int, rank: int, delay: float) -> Case:
    """Send SIGTERM to a rank of a run that would go on for long.

    Args:
        config: As that of `measure`.
        ranks: How many.
        rank: That gets it.
        delay: Seconds after the end of the first step.
    """
    with tempfile.TemporaryDirectory(prefix="megacog-fault-") as temporary:
        run_dir, log = Path(temporary) / "run", Path(temporary) / "output"
        arguments = ["--config", str(config), f"train.run_dir={run_dir}", "train.steps=1000000"]
        started, deadline = ForkedRanks(arguments, ranks, log), time.monotonic() + _LONGEST
        try:
            while not _records(run_dir, "train"):
                if time.monotonic() > deadline:
                    raise RuntimeError(log.read_text()[-_LAST:])
                time.sleep(0.01)
            time.sleep(delay)
            os.kill(started.pids[rank], signal.SIGTERM)
            since = time.monotonic()
            done = _records(run_dir, "train")[-1]["step"]
            found = started.wait(_LONGEST)
            while started.processes() and time.monotonic() < deadline:
                time.sleep(0.01)
            seconds, orphans = time.monotonic() - since, len(started.processes())
        finally:
            started.kill()
        codes = [-signal.SIGKILL if code is None else code for code in found]
        last, newest = _records(run_dir, "train")[-1], find_checkpoint(run_dir, "auto")
        saved = newest is not None and newest[1].step == last["step"] <= done + 2
        limit = last["seconds"] + sum(record["seconds"] for record in _records(run_dir, "checkpoint")[-1:])
        return Case(SIGNAL, "any", rank, round(limit, 2), codes, round(seconds, 2), orphans, saved, log.read_text())


def _records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    path = run_dir / FILE_NAME
    return [record for record in read_records(path) if record["kind"] == kind] if path.exists() else []


def run_forked_ranks(arguments: list[str], ranks: int, folder: Path, fault: str) -> tuple[list[int], float, int]:
    """Train on forked ranks of this machine; what they say is added to `folder`/output.

    Returns:
        Exit codes, when the last process of the run had ended (of the wall clock), and how many had to be killed.
    """
    port, processes = free_port(), []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            _become_rank(arguments, rank, ranks, port, folder / "output", fault)
        processes.append(process)
    codes = dict.fromkeys(processes, -signal.SIGKILL)
    left, deadline = set(processes), time.monotonic() + _LONGEST
    while left and time.monotonic() < deadline:
        for process in list(left):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                codes[process] = os.waitstatus_to_exitcode(status)
                left.remove(process)
        time.sleep(0.02)
    for process in left:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    while (orphans := list(_members(processes))) and time.monotonic() < deadline:
        time.sleep(0.02)
    ended = time.time()
    for orphan in orphans:
        os.kill(orphan, signal.SIGKILL)
    return [codes[process] for process in processes], ended, len(orphans) + len(left)


def _become_rank(arguments: list[str], rank: int, ranks: int, port: int, output: Path, fault: str) -> None:
    """Never returns."""
    os.setsid()  # the session tells which processes belong to the run
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", VARIABLE: fault})
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # The caller may have replaced them, as pytest does.
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    try:
        run(lambda: pretrain.main(arguments), leave=os._exit)
    except SystemExit as left:
        os._exit(left.code if isinstance(left.code, int) else 1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


def _members(sessions: Iterable[int]) -> Iterator[int]:
    """Living processes of the sessions."""
    wanted = set(sessions)
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) in wanted and fields[0] not in "ZX":
                yield int(entry)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not exceeded by this share of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """By kind: how many, seconds to the end at 50 % and 95 %, ranks not named, orphans, runs that ended with 0.

    The seconds of ranks that were not killed are those beyond the limit.
    """
    found = {}
    for kind in sorted({case.kind for case in cases}):
        mine = [case for case in cases if case.kind == kind]
        seconds = [round(case.seconds - case.limit, 2) for case in mine]
        found[kind] = {
            "cases": len(mine), "p50": quantile(seconds, 0.5), "p95": quantile(seconds, 0.95), "max": max(seconds),
            "not_named": sum(not case.named for case in mine), "orphans": sum(case.orphans for case in mine),
            "ended_with_0": sum(0 in case.codes for case in mine),
        }  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fault_times", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, type=Path, help="a small run with checkpoints and evaluations")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=["kill", "stop"], choices=sorted([*KINDS, SIGNAL]))
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("--rank", nargs="+", type=int, help="ranks that are hit (default: each in turn)")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--limit", type=float, default=4.0, help="seconds without progress that are allowed")
    arguments = parser.parse_args(argv)
    load_config(arguments.config)
    victims = arguments.rank or range(arguments.ranks)
    cases = []
    faults = [kind for kind in arguments.kinds if kind != SIGNAL]
    wanted = list(itertools.product(faults, arguments.phases, victims))
    wanted += [(SIGNAL, "any", rank) for rank in victims if SIGNAL in arguments.kinds]
    for _ in range(arguments.repeat):
        for kind, phase, rank in wanted:
            if kind == SIGNAL:
                case = measure_signal(arguments.config, arguments.ranks, rank, random.random())
            else:
                case = measure(arguments.config, arguments.ranks, kind, phase, rank, arguments.limit)
            cases.append(case)
            print(json.dumps({key: value for key, value in asdict(case).items() if key != "output"}), flush=True)
    print(json.dumps(summary(cases)), flush=True)
    return 0


if __name__ == "__main__":
    run(main)
