"""`soak.py steps`: does anything grow over thousands of steps? Memory, open files, checkpoints on disk.

One small run with loader processes, evaluation, TensorBoard and asynchronous saves trains in a process of its own;
from outside, its memory and open files and the size of its checkpoints are noted every few seconds. Memory grows while
caches fill, so the slope is that of the least squares line through what was noted after the first fifth of the steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from megacog.errors import EXIT_DONE, EXIT_FAULT, EnvError
from megacog.training.soak_inputs import make_inputs, settings, write_config
from megacog.training.soak_kills import last_step
from megacog.training.soak_ranks import ForkedRanks, fork
from megacog.training.soak_record import Line, SoakRecord

SOAK = "steps"
MOST_SLOPE = 1.0
"""MB per 1,000 steps; less counts as none: a leak of one small tensor per step is more."""
_WARM_UP = 0.2
"""Share of the steps that is left out of slopes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or go on, to the last step; 1 if something grew."""
    parser = argparse.ArgumentParser(prog="soak.py steps", description=__doc__)
    add = parser.add_argument
    add("--record", type=Path, required=True, help="JSON lines; those of an interrupted soak are continued")
    add("--steps", type=int, default=10_000, help="default: 10000")
    add("--every", type=int, default=100, help="steps between checkpoints and evaluations (default: 100)")
    add("--engine", choices=["deepspeed", "torch"], default="deepspeed", help="default: deepspeed, ZeRO 1")
    add("--seconds", type=float, default=2.0, help="between looks (default: 2)")
    add("--folder", type=Path, help="of the run (default: the record's name with .run)")
    arguments = parser.parse_args(argv)
    record = SoakRecord(arguments.record, SOAK)
    folder = (arguments.folder or arguments.record.with_suffix(".run")).resolve()
    if not (folder / "inputs").exists() and os.waitpid(fork(lambda: _inputs(folder)), 0)[1]:
        return EXIT_FAULT
    record.begin({name: str(value) for name, value in vars(arguments).items()})
    ranks = ForkedRanks(_arguments(folder, arguments), 1, folder / "log.txt")
    try:
        while ranks.poll() == [None]:
            time.sleep(arguments.seconds)
            _note(record, ranks.pids[0], folder / "run", arguments.steps)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return EXIT_FAULT
    finally:
        ranks.kill()
    if ranks.poll() != [0]:
        raise EnvError(f"the run ended with code {ranks.poll()[0]}: see {folder / 'log.txt'}")
    record.add("end", steps=arguments.steps)
    lines = list(record.lines())
    print(summary(lines))
    return EXIT_DONE if grows(lines) is None else EXIT_FAULT


def _inputs(folder: Path) -> int:
    make_inputs(folder / "inputs")
    return EXIT_DONE


def _arguments(folder: Path, arguments: argparse.Namespace) -> list[str]:
    values = settings(
        folder / "inputs", folder / "run", "base", engine=arguments.engine, steps=arguments.steps, precision="bf16",
        zero_stage=1 if arguments.engine == "deepspeed" else 0, global_batch_size=2, eval_every=arguments.every,
        eval_batches=1, learning_rate=1e-3, gradient_clip=1.0, log_every=10,
    )  # fmt: skip
    values["data"]["workers"] = 1
    values["checkpoint"] = {"every": arguments.every, "keep_last": 3}
    values["metrics"] = {"tensorboard": True}
    return ["--config", str(write_config(folder / "config.yaml", values))]


def _note(record: SoakRecord, pid: int, run_dir: Path, steps: int) -> None:
    try:
        step = last_step(run_dir)
        status = Path(f"/proc/{pid}/status").read_text()
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
        return  # not yet, or not any more
    if "RssAnon" not in status:
        return  # it has just ended
    memory = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.startswith("Rss")}
    folders = list((run_dir / "checkpoints").glob("*step-*"))
    size = sum(map(_bytes, folders))
    record.add(
        "look", pid=pid, step=step, anonymous_mb=memory["RssAnon"] / 1e3, resident_mb=sum(memory.values()) / 1e3,
        open_files=files, checkpoints=len(folders), checkpoint_mb=size / 1e6,
    )  # fmt: skip
    print(f"step {step}/{steps} | {memory['RssAnon'] / 1e3:.1f} MB | {files} open files | {len(folders)} checkpoints")


def _bytes(folder: Path) -> int:
    """Of a checkpoint that may be published or retired meanwhile."""
    total = 0
    with suppress(FileNotFoundError):
        for path in list(folder.iterdir()):
            total += path.stat().st_size
    return total


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least squares line."""
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


def processes(lines: Sequence[Line]) -> list[list[Line]]:
    """What was noted, without the warm up, by process: an interrupted soak has several."""
    looks = [line for line in lines if line["event"] == "look"]
    found = []
    for _, group in groupby(looks, key=lambda line: line["pid"]):
        mine = list(group)
        first, last = mine[0]["step"], mine[-1]["step"]
        found.append([line for line in mine if line["step"] >= first + _WARM_UP * (last - first)])
    return [mine for mine in found if len({line["step"] for line in mine}) > 2]


def grows(lines: Sequence[Line]) -> str | None:
    """What has grown, if anything."""
    for mine in processes(lines):
        if _memory_slope(mine) > MOST_SLOPE:
            return "memory"
        if len({line["open_files"] for line in mine[len(mine) // 2 :]}) > 2:
            return "open files"
    return None


def _memory_slope(mine: Sequence[Line]) -> float:
    """MB per 1,000 steps."""
    return 1000 * slope([(line["step"], line["anonymous_mb"]) for line in mine])


def summary(lines: Sequence[Line]) -> str:
    """What a record says."""
    text = []
    for mine in processes(lines):
        numbers: dict[str, list[Any]] = {name: [line[name] for line in mine] for name in mine[0]}
        memory, files = numbers["anonymous_mb"], numbers["open_files"]
        text.append(
            f"steps {mine[0]['step']} to {mine[-1]['step']}, {len(mine)} looks: memory {memory[0]:.1f} to "
            f"{memory[-1]:.1f} MB, slope {_memory_slope(mine):+.3f} MB per 1,000 steps; open files {min(files)} to "
            f"{max(files)}; at most {max(numbers['checkpoints'])} checkpoints, {max(numbers['checkpoint_mb']):.2f} MB"
        )
    verdict = grows(lines)
    return "\n".join([*text, f"GROWS: {verdict}" if verdict else "nothing grows"]) if text else "nothing is recorded"
