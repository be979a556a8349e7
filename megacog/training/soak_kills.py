"""Kill runs at random and see whether they end as if nothing had happened.

A trial is one small run. It is started, killed with SIGKILL at a random moment, started again, several times, and then
left to end. What must hold after each kill: no checkpoint that was complete is lost, none that is incomplete carries a
checkpoint's name, at most one save interval of steps is gone (two while a checkpoint is being written in the
background), the other ranks end by themselves when one is killed, nothing is left running. And in the end: files of
weights, optimizer states and generators, the export and the metrics are bit for bit those of a run that nobody killed.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megacog.checkpoint.commit import verify_folder
from megacog.checkpoint.discovery import list_checkpoints
from megacog.errors import CheckpointError
from megacog.metrics.record import FILE_NAME as METRICS
from megacog.metrics.record import read_records
from megacog.training.soak_ranks import StartedRanks
from megacog.training.soak_record import Line
from megacog.training.soak_runs import EVERY, PATIENCE, Failed, Layout, Runs, finish, look_at

_LAUNCHER_SECONDS = 20.0
"""After which the trial ends forked ranks that wait for one that was killed: they have no launcher that does."""
_COLD_SECONDS = 30.0
"""Of a launched start, from which the moments of its kills are drawn."""


@dataclass(frozen=True)
class Kill:
    """One kill and what was found after it."""

    whom: str
    """all, or a rank."""
    aim: str
    """time: a moment of the whole run; save: a moment after a save has begun."""
    seconds: float
    """From the start of the ranks."""
    phase: str
    """start, step, save, removal (of an old checkpoint) or export: what was going on."""
    reached: int
    """The last step that was recorded."""
    checkpoint: int
    """The newest complete checkpoint; 0 = none."""
    lost: int
    """Steps of this start that must be done again."""
    ended_seconds: float | None
    """Until the other ranks had ended by themselves, if one rank was killed; None, too, if that was before ranks had
    met, which only a launcher sees."""


def run_trial(runs: Runs, number: int, seed: int, launcher: str | None) -> Line:
    """Kill one run at random, several times; what to record. Its folder stays if something failed."""
    chance = random.Random(f"{seed}/{number}")
    layout = runs.layouts[number % len(runs.layouts)]
    folder = runs.folder / f"trial-{number:05d}"
    shutil.rmtree(folder, ignore_errors=True)
    started, kills, failure = time.monotonic(), [], None
    trial = _Trial(runs, layout, folder, launcher, chance)
    try:
        for _ in range(chance.randint(1, 2) if launcher else chance.randint(3, 6)):
            kill = trial.start_and_kill()
            if kill is None:
                break
            kills.append(kill)
        trial.end()
    except Failed as error:
        failure = f"{error} (see {folder})"
    finally:
        trial.clean_up()
    if failure is None:
        shutil.rmtree(folder)
    return {
        "trial": number, "layout": str(layout), "start": launcher or "fork", "kills": [asdict(kill) for kill in kills],
        "seconds": round(time.monotonic() - started, 3), "failure": failure,
    }  # fmt: skip


class _Trial:
    def __init__(self, runs: Runs, layout: Layout, folder: Path, launcher: str | None, chance: random.Random) -> None:
        self._runs, self._layout, self._folder = runs, layout, folder
        self._launcher, self._chance = launcher, chance
        self._run = folder / "run"
        self._reference = runs.reference(layout)
        self._starts = 0
        self._checkpoint = 0
        self._ranks: StartedRanks | None = None
        self._finished = False

    def start_and_kill(self) -> Kill | None:
        """One start and its kill; None if the run has ended before."""
        chance, saving = self._chance, self._chance.random() < 0.5
        whom = chance.randrange(self._layout.ranks) if self._layout.ranks > 1 and chance.random() < 0.4 else None
        saves, share = chance.randint(1, 3), chance.random()
        before, old = _identity(self._run / METRICS), _unfinished(self._run)
        ranks, started = self._start(), time.monotonic()
        if saving:
            self._wait_for_saves(ranks, saves, old)
            time.sleep(1.5 * share * self._reference.save_seconds)
        else:
            time.sleep(share * (_COLD_SECONDS if self._launcher else self._reference.seconds))
        seconds = time.monotonic() - started
        if None not in ranks.poll() or (whom is not None and not ranks.kill_rank(whom)):
            self._finish()
            return None
        ended = None
        if whom is None:
            ranks.kill()
        else:
            ended = self._others_end(ranks, whom)
            if self._finished:
                return None
        reached, checkpoint = last_step(self._run), self._find_checkpoint()
        trained = _identity(self._run / METRICS) != before
        lost = max(0, reached - checkpoint) if trained else 0
        phase = _phase(_unfinished(self._run) - old) or ("step" if trained else "start")
        self._check_lost(lost, checkpoint)
        self._checkpoint = checkpoint
        aim, victim = "save" if saving else "time", "all" if whom is None else f"rank {whom}"
        return Kill(victim, aim, round(seconds, 4), phase, reached, checkpoint, lost, ended)

    def end(self) -> None:
        """Let the run end, and compare."""
        if not self._finished:
            self._start()
            self._finish()
        found, expected = look_at(self._run), self._reference.ended
        if found.metrics != expected.metrics:
            raise Failed("the metrics are not those of the undisturbed run")
        if found.files != expected.files:
            names = sorted(name for name, _ in found.files.items() ^ expected.files.items())
            raise Failed(f"not what the undisturbed run has left: {', '.join(dict.fromkeys(names))}")

    def clean_up(self) -> None:
        if self._ranks is not None:
            self._ranks.kill()

    def _start(self) -> StartedRanks:
        self._ranks = self._runs.start(self._layout, self._folder, self._starts, self._launcher)
        self._starts += 1
        return self._ranks

    def _finish(self) -> None:
        assert self._ranks is not None
        finish(self._ranks, self._folder)
        self._check_start()
        self._finished = True

    def _wait_for_saves(self, ranks: StartedRanks, saves: int, old: set[str]) -> None:
        """Until so many saves of this start have begun, or it has ended."""
        seen: set[str] = set()
        deadline = time.monotonic() + PATIENCE
        while len(seen) < saves and None in ranks.poll():
            seen |= {name for name in _unfinished(self._run) - old if _phase({name}) == "save"}
            if time.monotonic() > deadline:
                raise Failed(f"no save begins within {PATIENCE:g} s")
            time.sleep(0.001)

    def _others_end(self, ranks: StartedRanks, whom: int) -> float | None:
        """Seconds until all have ended by themselves after a rank was killed, and nothing is left.

        None if ranks without a launcher had not met.
        """
        killed = time.monotonic()
        codes = ranks.wait(_LAUNCHER_SECONDS)
        if None in codes and self._launcher is None and "ranks have met" not in self._log():
            ranks.kill()
            return None
        codes = ranks.wait(PATIENCE)
        if None in codes:
            raise Failed(f"rank {whom} was killed, and {PATIENCE:g} s later others still run")
        seconds = time.monotonic() - killed
        others = [code for rank, code in enumerate(codes) if self._launcher or rank != whom]
        if 0 in others:
            if not (self._run / "export/manifest.json").exists():
                raise Failed(f"rank {whom} was killed, and the others say that all is well: exit codes {codes}")
            self._finished = True  # it was on its way out
            self._check_start()
        while left := ranks.processes():
            if time.monotonic() > killed + PATIENCE:
                raise Failed(f"rank {whom} was killed, and these are left: {[process.command for process in left]}")
            time.sleep(0.05)
        return round(seconds, 3)

    def _find_checkpoint(self) -> int:
        """The step of the newest checkpoint, all of which must be whole."""
        self._check_start()
        found = list_checkpoints(self._run)
        for path in found:
            try:
                verify_folder(path)
            except CheckpointError as error:
                raise Failed(f"{path.name} is named as a checkpoint, but {error}") from error
        return int(found[0].name.removeprefix("step-")) if found else 0

    def _log(self) -> str:
        """Of the last start."""
        return (self._folder / f"start-{self._starts - 1}.log").read_text(errors="replace")

    def _check_start(self) -> None:
        """The start that has just ended must have continued from the newest checkpoint that was there."""
        text = self._log()
        resumed = [int(step) for step in re.findall(r"resumed at step (\d+) from", text)]
        if resumed not in ([], [self._checkpoint]) or (self._checkpoint == 0 and resumed):
            raise Failed(f"resumed at {resumed}, not at step {self._checkpoint}")
        if not resumed and self._checkpoint and re.search(r"step \d+/\d+ \| loss", text):
            raise Failed(f"started anew, although there was a checkpoint of step {self._checkpoint}")

    def _check_lost(self, lost: int, checkpoint: int) -> None:
        if checkpoint < self._checkpoint:
            raise Failed(f"the checkpoint of step {self._checkpoint} is lost; the newest is {checkpoint}")
        most = EVERY * (2 if self._layout.asynchronous else 1)
        if lost > most:
            raise Failed(f"{lost} steps are lost, more than {most}")


def _unfinished(run_dir: Path) -> set[str]:
    """Names of checkpoints, frozen weights and exports that are not complete, or not completely removed."""
    found = set()
    for folder, names in ((run_dir, (".frozen.", ".export.")), (run_dir / "checkpoints", (".step-",))):
        try:
            found |= {name for name in os.listdir(folder) if name.startswith(names)}
        except FileNotFoundError:
            continue
    return found


def _phase(unfinished: set[str]) -> str | None:
    """What these names belong to."""
    if any(name.startswith(".export.") for name in unfinished):
        return "export"
    if any(".tmp-" in name for name in unfinished):
        return "save"
    return "removal" if unfinished else None


def last_step(run_dir: Path) -> int:
    """The last step that is recorded."""
    path = run_dir / METRICS
    records = read_records(path) if path.exists() else ()
    return max((record["step"] for record in records if record["kind"] == "train"), default=0)


def _identity(path: Path) -> tuple[int, int] | None:
    """Changes when a run has truncated its records, and when it has added one."""
    try:
        status: Any = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size
