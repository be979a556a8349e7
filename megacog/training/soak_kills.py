"""Kill runs at random and see whether they end as if nothing had happened.

A trial is one small run. It is started, killed with SIGKILL at a random moment, started again, several times, and then
left to end. What must hold after each kill: no checkpoint that was complete is lost, none that is incomplete carries a
checkpoint's name, at most one save interval of steps is gone (two while a checkpoint is being written in the
background), the other ranks end by themselves when one is killed, nothing is left running. And in the end: files of
weights, optimizer states and generators, the export and the metrics are bit for bit those of a run that nobody killed.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import importlib
import itertools
import json
import os
import random
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megacog.checkpoint.commit import verify_folder
from megacog.checkpoint.discovery import list_checkpoints
from megacog.errors import CheckpointError
from megacog.metrics.record import FILE_NAME as METRICS
from megacog.metrics.record import read_records
from megacog.runtime.files import sha256_file, write_json
from megacog.training import pretrain
from megacog.training.soak_inputs import settings, write_config
from megacog.training.soak_ranks import ForkedRanks, LaunchedRanks, StartedRanks
from megacog.training.soak_record import Line

STEPS = 12
EVERY = 2
"""Steps between checkpoints."""
PATIENCE = 600.0
"""Seconds after which something that should have happened counts as hanging; the machine may be very busy."""
_TIMES = ("seconds", "tokens_per_second", "tflops", "hardware_tflops", "mfu", "hfu", "memory_gib", "data_wait", "time")
"""What metrics say about the machine, not about the run."""
_MODULES = "modules.txt"
_COLD_SECONDS = 30.0
"""Of a launched start, from which the moments of its kills are drawn."""


class Failed(Exception):
    """Something that must hold does not."""


@dataclass(frozen=True)
class Layout:
    """A kind of run."""

    engine: str
    zero_stage: int
    ranks: int
    tensor: int
    asynchronous: bool
    stage: str
    """base, or sequential on a frozen base."""

    def __str__(self) -> str:
        engine = f"zero{self.zero_stage}" if self.engine == "deepspeed" else self.engine
        split = "" if self.ranks == 1 else "-tensor" if self.tensor > 1 else "-data"
        return f"{engine}-{self.ranks}{split}-{'async' if self.asynchronous else 'sync'}-{self.stage}"


def all_layouts() -> list[Layout]:
    """Every engine on one rank and on two, that share the data or the tensors, both ways of saving, both stages."""
    engines = [("torch", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
    found = []
    for (engine, zero), (ranks, tensor), asynchronous, stage in itertools.product(
        engines, [(1, 1), (2, 1), (2, 2)], (True, False), ("base", "sequential")
    ):
        if zero < 3 or tensor == 1:
            found.append(Layout(engine, zero, ranks, tensor, asynchronous, stage))
    random.Random(0).shuffle(found)  # so that a few trials in a row are already a mix
    return found


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
    """Until the other ranks had ended by themselves, if one rank was killed."""


@dataclass(frozen=True)
class Ended:
    """What a finished run has left."""

    files: dict[str, str]
    """Below the run's folder, with their sha256."""
    metrics: str
    """sha256 of all records of training and evaluation, without times."""


@dataclass(frozen=True)
class Reference:
    """The run that nobody kills."""

    ended: Ended
    seconds: float
    save_seconds: float
    """Median of its checkpoints."""


class Runs:
    """Where trials take place.

    Args:
        folder: Holds inputs and an export to inherit, as `prepare` has made them; trials get folders of their own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def layouts(self) -> list[Layout]:
        return all_layouts()

    def prepare(self, make_inputs: Callable[[Path], object]) -> int:
        """Make inputs and, in this process, the base that frozen stages inherit; 0 if all is well."""
        make_inputs(self.folder / "inputs")
        layout = Layout("deepspeed", 1, 1, 1, False, "base")
        code = pretrain.main(self._arguments(layout, self.folder / "base"))
        (self.folder / _MODULES).write_text("\n".join(sys.modules))
        return code

    def warm_up(self) -> None:
        """Import what the run of `prepare` has imported, so that forked ranks need not."""
        for name in (self.folder / _MODULES).read_text().splitlines():
            with suppress(Exception):  # some modules exist only where something else has made them
                importlib.import_module(name)
        gc.freeze()  # a child's collector must not touch, and so copy, the memory that it shares

    def start(self, layout: Layout, folder: Path, number: int, launcher: str | None = None) -> StartedRanks:
        """Start, or start again, a run; `number` counts its starts."""
        arguments, log = self._arguments(layout, folder), folder / f"start-{number}.log"
        if launcher is None:
            return ForkedRanks(arguments, layout.ranks, log)
        return LaunchedRanks(launcher, arguments, layout.ranks, log)

    def _arguments(self, layout: Layout, folder: Path) -> list[str]:
        """Of pretrain.py, whose run is `folder/run`."""
        values = settings(
            self.folder / "inputs", folder / "run", layout.stage, engine=layout.engine, zero_stage=layout.zero_stage,
            steps=STEPS, precision="fp32" if layout.stage == "base" else "bf16", global_batch_size=4,
            eval_every=8, eval_batches=1, learning_rate=3e-3, gradient_clip=1.0,
        )  # fmt: skip
        if layout.stage != "base":
            values["model"]["inherit"] = str(self.folder / "base/run/export")
        values["checkpoint"] = {"every": EVERY, "keep_last": 2, "asynchronous": layout.asynchronous}
        values["parallel"] = {"tensor": layout.tensor}
        folder.mkdir(parents=True, exist_ok=True)
        return ["--config", str(write_config(folder / "config.yaml", values))]

    def reference(self, layout: Layout) -> Reference:
        """What a run must end as; made by whoever needs it first."""
        folder = self.folder / "references"
        folder.mkdir(exist_ok=True)
        path = folder / f"{layout}.json"
        with open(folder / f"{layout}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                write_json(path, asdict(self._make_reference(layout, folder / str(layout))))
        content = json.loads(path.read_text())
        return Reference(Ended(**content.pop("ended")), **content)

    def _make_reference(self, layout: Layout, folder: Path) -> Reference:
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        _finish(self.start(layout, folder, 0), folder)
        seconds = time.monotonic() - started
        saves = [r["seconds"] for r in read_records(folder / "run" / METRICS) if r["kind"] == "checkpoint"]
        ended = look_at(folder / "run")
        shutil.rmtree(folder)
        return Reference(ended, seconds, statistics.median(saves))


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
    def __init__(
        self, runs: Runs, layout: Layout, folder: Path, launcher: str | None, chance: random.Random
    ) -> None:
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
        _finish(self._ranks, self._folder)
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

    def _others_end(self, ranks: StartedRanks, whom: int) -> float:
        """Seconds until all have ended by themselves after a rank was killed, and nothing is left."""
        killed = time.monotonic()
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

    def _check_start(self) -> None:
        """The start that has just ended must have continued from the newest checkpoint that was there."""
        text = (self._folder / f"start-{self._starts - 1}.log").read_text(errors="replace")
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


def look_at(run_dir: Path) -> Ended:
    """What a finished run has left.

    Raises:
        Failed: Steps are missing or recorded twice, or temporary files are left.
    """
    if left := [path.name for path in run_dir.rglob(".*")]:
        raise Failed(f"left over: {', '.join(left)}")
    numbers = [
        {name: value for name, value in record.items() if name not in _TIMES}
        for record in read_records(run_dir / METRICS)
        if record["kind"] in ("train", "eval")
    ]
    steps = [record["step"] for record in numbers if record["kind"] == "train"]
    if steps != list(range(1, STEPS + 1)):
        raise Failed(f"the metrics have steps {steps}")
    folders = [*(run_dir / "checkpoints").glob("step-*"), run_dir / "export"]
    files = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
    hashes = {str(path.relative_to(run_dir)): sha256_file(path) for path in files}
    return Ended(hashes, hashlib.sha256(json.dumps(numbers).encode()).hexdigest())


def _finish(ranks: StartedRanks, folder: Path) -> None:
    codes = ranks.wait(PATIENCE)
    ranks.kill()
    if any(code != 0 for code in codes):
        last = sorted(folder.glob("start-*.log"))[-1]
        raise Failed(f"exit codes {codes} of a start that nobody killed: {last.read_text(errors='replace')[-1500:]}")


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
