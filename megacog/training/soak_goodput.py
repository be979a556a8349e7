"""`soak.py goodput`: how much of the bare step rate is left with everything that a run does besides, and with a kill.

Bare steps compute on one batch in memory and nothing else. The same model trains with loader processes, log lines,
metrics.jsonl, TensorBoard, evaluations and asynchronous saves, is killed at a random moment near the middle, started
again, and ends. The two take turns, since a machine's speed may change from minute to minute by more than what is to be
measured: the run is suspended as a whole while bare steps compute. Goodput is its rate over the bare rate, without
the time from the kill until the steps that were lost have been made again.

On a machine that others use, too, clocks say more about the others. So there are two more figures, for which that
cancels out: the processor time of a bare step over that of the run's process per step, and the share of the run's time
in which it was computing steps.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
import random
import shutil
import signal
import statistics
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacog.config.load import load_config
from megacog.errors import EXIT_DONE, EXIT_FAULT, EnvError
from megacog.metrics.record import FILE_NAME as METRICS
from megacog.metrics.record import read_records
from megacog.parallel.groups import build_process_groups
from megacog.planning.plan import accumulation_steps
from megacog.runtime.ranks import discover
from megacog.training import pretrain
from megacog.training.soak_inputs import make_inputs, settings, write_config
from megacog.training.soak_ranks import ForkedRanks, fork
from megacog.training.soak_record import Line, SoakRecord
from megacog.training.synthetic import random_engine, random_inputs

SOAK = "goodput"
GOAL = 0.97
_SAVES = 15
"""Of a run: every 2 minutes of 30."""
_BARE_SHARE = 0.1
"""Of the run's time, for bare steps."""
_TURN = 20.0
"""Seconds of the run before bare steps have their turn, or this share of a short run:"""
_TURNS = 20
_LOOKS = 200
"""At a run, at least, if it lasts as long as it was asked to."""
_WARM_UP = 3
"""First steps of every process that do not count: memory is touched for the first time."""

_COUNT = struct.Struct("<Q")

Record = dict[str, Any]


@dataclass(frozen=True)
class Bare:
    """Bare steps."""

    steps: int
    seconds: float
    """Mean of one."""
    cpu_seconds: float


class BareSteps:
    """A process that computes bare steps when it has the turn, and is stopped else.

    Args:
        config: Whose model and batch size it takes.
    """

    def __init__(self, config: Path) -> None:
        self._memory = mmap.mmap(-1, _COUNT.size)
        self.pid = fork(lambda: _compute_on_and_on(config, self._memory))
        while self.steps < _WARM_UP:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                raise EnvError("the process of bare steps has ended; see its error above")
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGSTOP)
        self._since, self._cpu_since = self.steps, _cpu_seconds(self.pid)
        self._seconds = 0.0

    @property
    def steps(self) -> int:
        """That it has computed."""
        return int(_COUNT.unpack(self._memory[:])[0])

    def compute(self, seconds: float) -> None:
        """Give it the turn for so long, the first time until a step is done."""
        start = time.monotonic()
        os.kill(self.pid, signal.SIGCONT)
        time.sleep(seconds)
        while self.steps == self._since:
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGSTOP)
        self._seconds += time.monotonic() - start

    def found(self) -> Bare:
        """What all turns have come to; a step may have gone on over several."""
        steps = self.steps - self._since
        return Bare(steps, self._seconds / steps, (_cpu_seconds(self.pid) - self._cpu_since) / steps)

    def end(self) -> None:
        """No more turns."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@dataclass
class Turns:
    """Suspends a run now and then for bare steps.

    Attributes:
        bare: The steps.
        every: Seconds of the run between two turns of theirs.
        pauses: Begin and end of those by the wall clock.
    """

    bare: BareSteps
    every: float
    pauses: list[tuple[float, float]] = field(default_factory=list)

    def take(self, ranks: ForkedRanks) -> None:
        """Bare steps have their turn, if the run had its own since the last one."""
        if self.pauses and time.time() - self.pauses[-1][1] < self.every:
            return
        start = time.time()
        ranks.signal_all(signal.SIGSTOP)
        self.bare.compute(_BARE_SHARE * self.every)
        ranks.signal_all(signal.SIGCONT)
        self.pauses.append((start, time.time()))

    def within(self, start: float, end: float) -> float:
        """Seconds of pauses between two moments."""
        return sum(max(0.0, min(end, to) - max(start, since)) for since, to in self.pauses)


@dataclass(frozen=True)
class Stretch:
    """Steps of one process in a row."""

    steps: int
    seconds: float
    """From the end of the step before the first to that of the last."""
    step_seconds: float
    """Of these, in steps and not waiting for data."""
    cpu_seconds: float

    @staticmethod
    def between(
        records: Sequence[Record], cpu: Sequence[tuple[int, float]], after: int,
        paused: Callable[[float, float], float],
    ) -> Stretch:  # fmt: skip
        """Of the records of training of one process, the steps later than `after`.

        Args:
            records: In order.
            cpu: Steps and processor seconds up to them.
            after: A recorded step.
            paused: Seconds between two moments in which the run was suspended, as a rule within a step.
        """
        start = next(record for record in records if record["step"] == after)
        counted = [record for record in records if record["step"] > after]
        computing = sum(record["seconds"] * (1 - record["data_wait"]) for record in counted)
        points = [point for point in cpu if point[0] >= after]
        rate = statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope
        pauses = paused(start["time"], counted[-1]["time"])
        seconds = counted[-1]["time"] - start["time"] - pauses
        return Stretch(len(counted), seconds, computing - pauses, rate * len(counted))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure once; 1 if the goal is missed. What was interrupted starts again from its beginning."""
    parser = argparse.ArgumentParser(prog="soak.py goodput", description=__doc__)
    add = parser.add_argument
    add("--record", type=Path, required=True, help="JSON lines, to which the measurement is added")
    add("--minutes", type=float, default=30.0, help="of the run; there is a save every 1/15 of it (default: 30)")
    add("--engine", choices=["deepspeed", "torch"], default="deepspeed", help="default: deepspeed, ZeRO 1")
    add("--width", type=int, default=256, help="of the model of 4 layers (default: 256)")
    add("--workers", type=int, default=1, help="loader processes (default: 1)")
    add("--seed", type=int, default=1, help="of the moment of the kill (default: 1)")
    add("--folder", type=Path, help="of the run (default: the record's name with .run)")
    arguments = parser.parse_args(argv)
    record = SoakRecord(arguments.record, SOAK)
    folder = (arguments.folder or arguments.record.with_suffix(".run")).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    record.begin({name: str(value) for name, value in vars(arguments).items()})
    seconds = 60 * arguments.minutes
    _in_child(lambda: make_inputs(folder / "inputs"))
    turns = Turns(BareSteps(_config(folder, arguments, steps=40)), min(_TURN, seconds / _TURNS))
    try:
        turns.bare.compute(max(2.0, seconds / 100))
        first = turns.bare.found()
        print(f"bare: {first.steps} steps of {first.seconds:.3f} s", flush=True)
        steps = max(40, round(seconds / first.seconds))
        stretches, lost, restart = _disturbed_run(folder, arguments, steps, turns)
        bare = turns.bare.found()
    finally:
        turns.bare.end()
    line = {
        "bare": asdict(bare), "turns": len(turns.pauses), "stretches": [asdict(stretch) for stretch in stretches],
        "lost": lost, "restart_seconds": restart, "save_every": max(1, steps // _SAVES),
    }  # fmt: skip
    record.add("end", **line)
    print(summary(line))
    return EXIT_DONE if goodput(line)["clock"] >= GOAL else EXIT_FAULT


def _config(folder: Path, arguments: argparse.Namespace, steps: int) -> Path:
    values = settings(
        folder / "inputs", folder / "run", "sequential", engine=arguments.engine, steps=steps,
        zero_stage=1 if arguments.engine == "deepspeed" else 0, eval_every=max(1, steps // 5), eval_batches=1,
        learning_rate=1e-4, gradient_clip=1.0, log_every=1,
    )  # fmt: skip
    values["train"]["stage"] = "base"
    values["model"] |= {"num_layers": 4, "hidden_size": arguments.width}
    values["data"]["workers"] = arguments.workers
    values["checkpoint"] = {"every": max(1, steps // _SAVES), "keep_last": 2}
    values["metrics"] = {"tensorboard": True}
    return write_config(folder / "config.yaml", values)


def _compute_on_and_on(path: Path, memory: mmap.mmap) -> None:
    """Bare steps without end, counted in shared memory."""
    discover()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = load_config(path)
    config = pretrain.resolve(config, pretrain.open_tokenizers(config))
    engine = random_engine(config, torch.device("cpu"), build_process_groups(1))
    inputs, micro_batches = random_inputs(config, torch.device("cpu")), accumulation_steps(config, 1)
    for step in itertools.count(1):
        for _ in range(micro_batches):
            engine.backward(engine.forward(**inputs).loss)
        engine.step(1e-4)
        memory[:] = _COUNT.pack(step)


def _disturbed_run(
    folder: Path, arguments: argparse.Namespace, steps: int, turns: Turns
) -> tuple[list[Stretch], int, float]:
    """What counts of both processes, the steps that were lost, and the seconds until they had been made again."""
    command = ["--config", str(_config(folder, arguments, steps))]
    kill_at = random.Random(arguments.seed).randint(round(0.4 * steps), round(0.6 * steps))
    pause = min(0.5, 60 * arguments.minutes / _LOOKS)
    cpu = _watch(ForkedRanks(command, 1, folder / "log-0.txt"), folder / "run", steps, pause, turns, kill_at)
    killed = time.time()
    first = _training(folder / "run")
    reached = first[-1]["step"]
    print(f"killed after step {reached}", flush=True)
    cpu_again = _watch(ForkedRanks(command, 1, folder / "log-1.txt"), folder / "run", steps, pause, turns)
    records = _training(folder / "run")
    again = [record for record in records if record["time"] > killed]
    redone = max(reached, again[0]["step"] + _WARM_UP)
    stretches = [
        Stretch.between(first, cpu, _WARM_UP, turns.within), Stretch.between(again, cpu_again, redone, turns.within),
    ]  # fmt: skip
    made_again = next(record["time"] for record in again if record["step"] == redone)
    restart = made_again - killed - turns.within(killed, made_again)
    return stretches, reached - again[0]["step"] + 1, restart


def _watch(
    ranks: ForkedRanks, run_dir: Path, steps: int, pause: float, turns: Turns, kill_at: int | None = None
) -> list[tuple[int, float]]:
    """Processor seconds by step, until the run ends or is killed; looked at every `pause` seconds."""
    found: list[tuple[int, float]] = []
    try:
        while ranks.poll() == [None]:
            time.sleep(pause)
            training = _training(run_dir)
            step = training[-1]["step"] if training else 0
            found.append((step, _cpu_seconds(ranks.pids[0])))
            if sys.stderr.isatty() or len(found) % 120 == 0:
                print(f"step {step}/{steps}", flush=True)
            if kill_at is not None and step >= kill_at:
                return found[:-1]
            if step:
                turns.take(ranks)
    finally:
        ranks.kill()
    if ranks.poll() != [0]:
        raise EnvError(f"the run ended with code {ranks.poll()[0]}: see the logs in {run_dir.parent}")
    return found[:-1]  # the last look may have come after the end


def _training(run_dir: Path) -> list[Record]:
    path = run_dir / METRICS
    return [record for record in read_records(path) if record["kind"] == "train"] if path.exists() else []


def _cpu_seconds(pid: int) -> float:
    """Of all threads, not of other processes."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _in_child(work: Any) -> None:
    """Do what computes in a process of its own: this one is to be forked."""
    code = os.waitstatus_to_exitcode(os.waitpid(fork(lambda: work() and EXIT_DONE), 0)[1])
    if code != 0:
        raise EnvError(f"a process ended with code {code}; see its error above")


def goodput(line: Line) -> dict[str, float]:
    """By clock, by processor time, and the share of the run in steps."""
    bare, stretches = Bare(**line["bare"]), [Stretch(**x) for x in line["stretches"]]
    steps, seconds = sum(x.steps for x in stretches), sum(x.seconds for x in stretches)
    return {
        "clock": bare.seconds * steps / seconds,
        "processor": bare.cpu_seconds * steps / sum(x.cpu_seconds for x in stretches),
        "in steps": sum(x.step_seconds for x in stretches) / seconds,
    }


def summary(line: Line) -> str:
    """What was measured."""
    found, bare = goodput(line), Bare(**line["bare"])
    steps = sum(x["steps"] for x in line["stretches"])
    seconds = sum(x["seconds"] for x in line["stretches"])
    return (
        f"{steps} steps in {seconds / 60:.1f} min with a save every {line['save_every']} steps; "
        f"{bare.steps} bare steps in {line['turns']} turns between: {bare.seconds:.4f} s "
        f"({bare.cpu_seconds:.4f} s of processor)\n"
        f"goodput {found['clock']:.4f} by the clock (goal {GOAL}), {found['processor']:.4f} by processor time; "
        f"{found['in steps']:.4f} of the time in steps\n"
        f"one kill: {line['lost']} steps lost, made again {line['restart_seconds']:.1f} s after it"
    )
