"""`soak.py kills`: trials of killed runs, several at a time, until so many kills are recorded."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from megacog.errors import EXIT_DONE, EXIT_FAULT
from megacog.runtime.hardware import available_cores
from megacog.training.soak_inputs import make_inputs
from megacog.training.soak_kills import run_trial
from megacog.training.soak_ranks import fork
from megacog.training.soak_record import Line, SoakRecord, quantile
from megacog.training.soak_runs import EVERY, Runs

SOAK = "kills"
_LAUNCHERS = ("deepspeed", "torchrun")


def main(argv: Sequence[str] | None = None) -> int:
    """Run trials until the record holds `--kills` kills; 1 if something failed in any of them."""
    parser = argparse.ArgumentParser(prog="soak.py kills", description=__doc__)
    add = parser.add_argument
    add("--record", type=Path, required=True, help="JSON lines; those of an interrupted soak are continued")
    add("--kills", type=int, default=1000, help="until so many are recorded (default: 1000)")
    add("--jobs", type=int, default=available_cores(), help="trials at a time (default: cores)")
    add("--seed", type=int, default=1, help="of all random choices (default: 1)")
    add("--cold-every", type=int, default=25, help="every so many trials one under a launcher; 0 = none (default: 25)")
    add("--folder", type=Path, help="where trials take place (default: the record's name with .trials)")
    arguments = parser.parse_args(argv)
    record = SoakRecord(arguments.record, SOAK)
    folder = arguments.folder or arguments.record.with_suffix(".trials")
    if count_kills(record.lines()) >= arguments.kills:
        return _tell_all(record, arguments.kills)
    runs = Runs(folder.resolve())
    for old in ("inputs", "base", "references"):  # of a former version, perhaps
        shutil.rmtree(folder / old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    code = _wait(fork(lambda: runs.prepare(make_inputs)))
    if code != 0:
        return code
    runs.warm_up()
    record.begin({name: str(value) for name, value in vars(arguments).items()})
    soak = _Soak(record, runs, arguments)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        soak.run()
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
    finally:
        soak.stop()
        signal.signal(signal.SIGTERM, previous)
    return _tell_all(record, arguments.kills)


def _tell_all(record: SoakRecord, kills: int) -> int:
    lines = list(record.lines())
    print(summary(lines))
    return EXIT_DONE if count_kills(lines) >= kills and not failures(lines) else EXIT_FAULT


class _Soak:
    def __init__(self, record: SoakRecord, runs: Runs, arguments: argparse.Namespace) -> None:
        self._record, self._runs, self._arguments = record, runs, arguments
        self._running: dict[int, int] = {}
        """Trial of each child."""
        self._taken = {line["trial"] for line in record.lines("trial")}
        self._started, self._before = time.monotonic(), count_kills(record.lines())

    def run(self) -> None:
        number = 0
        while True:
            kills = count_kills(self._record.lines())
            while kills < self._arguments.kills and len(self._running) < self._arguments.jobs:
                while number in self._taken:
                    number += 1
                self._taken.add(number)
                self._record.add("begin", trial=number)
                self._running[fork(lambda number=number: self._trial(number))] = number  # type: ignore[misc]
            if not self._running:
                return
            pid, status = os.waitpid(-1, 0)
            trial, code = self._running.pop(pid), os.waitstatus_to_exitcode(status)
            if code != 0:  # the soak's own process failed: that counts, or a bug in it could hide one in a run
                self._record.add("trial", trial=trial, kills=[], failure=f"the trial's process ended with code {code}")
            self._tell(trial)

    def stop(self) -> None:
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)  # and with it its ranks
            os.waitpid(pid, 0)
        self._running.clear()

    def _trial(self, number: int) -> int:
        every = self._arguments.cold_every
        launcher = _LAUNCHERS[number // every % len(_LAUNCHERS)] if every and number % every == every - 1 else None
        try:
            self._record.add("trial", **run_trial(self._runs, number, self._arguments.seed, launcher))
        except Exception:
            traceback.print_exc()
            return EXIT_FAULT
        return EXIT_DONE

    def _tell(self, trial: int) -> None:
        lines = list(self._record.lines())
        line = next(line for line in reversed(lines) if line["event"] == "trial" and line["trial"] == trial)
        kills = count_kills(lines)
        rate = max(kills - self._before, 1e-9) / (time.monotonic() - self._started)
        left = max(0, self._arguments.kills - kills) / rate / 60
        verdict = line["failure"] or "as if nobody had killed it"
        print(
            f"trial {trial} | {line.get('layout', '?')}, {line.get('start', '?')} | {len(line['kills'])} kills: "
            f"{verdict} | "
            f"{kills}/{self._arguments.kills} kills, {len(failures(lines))} failures, {left:.0f} min left",
            flush=True,
        )


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def count_kills(lines: Iterable[Line]) -> int:
    return sum(len(line["kills"]) for line in lines if line["event"] == "trial")


def failures(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if line["event"] == "trial" and line["failure"]]


def summary(lines: Sequence[Line]) -> str:
    """What a record says, counted."""
    trials = [line for line in lines if line["event"] == "trial"]
    begun = [line["trial"] for line in lines if line["event"] == "begin"]
    kills = [(trial, kill) for trial in trials for kill in trial["kills"]]
    if not kills:
        return "no kills are recorded"
    again = len(begun) - len(trials)
    failed = failures(lines)
    text = [
        f"{len(kills)} kills in {len(trials)} runs, {len(trials) - len(failed)} runs ended bit for bit as undisturbed "
        f"ones, {len(failed)} failures; {again} runs that still go on or were interrupted with the soak do not count",
        "  killed: " + _counted(kill["whom"] for _, kill in kills),
        "  while: " + _counted(kill["phase"] for _, kill in kills),
        "  runs started by: " + _counted(trial.get("start", "?") for trial in trials),
        "  layouts: " + _counted(trial.get("layout", "?") for trial in trials),
    ]
    alone = sum(kill["whom"] != "all" and kill["ended_seconds"] is None for _, kill in kills)
    if alone:
        text.append(f"  killed before ranks had met, the others ended as by a launcher: {alone}")
    for saving in ("sync", "async"):
        lost = [kill["lost"] for trial, kill in kills if f"-{saving}-" in trial["layout"]]
        if lost:
            mean = sum(lost) / len(lost)
            text.append(
                f"  steps lost per kill, {saving} saves every {EVERY} steps: mean {mean:.2f}, most {max(lost)} "
                f"({_counted(lost)})"
            )
    for start in ("fork", *_LAUNCHERS):
        waits = [k["ended_seconds"] for trial, k in kills if trial["start"] == start and k["ended_seconds"] is not None]
        if waits:
            text.append(
                f"  seconds until the others had ended after one rank was killed ({start}): median "
                f"{quantile(waits, 0.5):.2f}, 95 % {quantile(waits, 0.95):.2f}, most {max(waits):.2f} of {len(waits)}"
            )
    text += [f"  FAILED trial {line['trial']}: {line['failure']}" for line in failed]
    return "\n".join(text)


def _counted(values: Iterable[object]) -> str:
    return ", ".join(f"{value} {count}" for value, count in sorted(Counter(values).items(), key=lambda item: str(item)))
