"""Measures training on this machine: step time, memory and where the time goes, on random weights and codes.

    python launch/benchmark.py train                          on a GPU: the 9B model; on a CPU: the demo's model
    python launch/benchmark.py train --config F key=value     any other model

Each case is built, warmed up, timed and profiled by itself, in one process, beside this run's own matrix product.
"""

from __future__ import annotations

import argparse
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megacog.config.schema import Config
from megacog.errors import EXIT_DONE, EXIT_FAULT, ConfigError, MegacogError
from megacog.metrics.profile import KINDS
from megacog.planning.cluster import GIB, Cluster, find_device
from megacog.planning.plan import plan, plan_peak
from megacog.runtime.cli import run
from megacog.runtime.files import write_json
from megacog.runtime.hardware import describe_device, device_name
from megacog.runtime.peak_memory import what
from megacog.runtime.speed import copy_bandwidth, matmul_tflops
from megacog.training.measure import Case, Measured, case_config, measure
from megacog.training.precision import DTYPES

ROOT = Path(__file__).resolve().parents[2]
GPU_CONFIG, CPU_CONFIG = ROOT / "configs/cogvideo-9b.yaml", ROOT / "configs/digits.yaml"
ORIGINAL_TOKENS_PER_SECOND = 470
"""Of one A100 in the original's published run: 416 samples of 2064 tokens in 17 to 19 s on 104 of them."""
MEMORY_LIMIT = 135 * GIB
GPU_SECONDS, CPU_SECONDS = 20.0, 3.0


@dataclass(frozen=True)
class Goal:
    """What the 9B model is to reach on one H200, and what after that."""

    name: str
    limits: tuple[float, ...]
    at_least: bool
    value: float | None
    """None = not run."""

    def __str__(self) -> str:
        compare, sign = (operator.ge, ">=") if self.at_least else (operator.le, "<=")
        goal = [f"{sign} {limit:g}" for limit in self.limits]
        if self.value is None:
            return f"{self.name:64} {'':>8}  goal {', then '.join(goal)}  not run"
        reached = ["reached" if compare(self.value, limit) else "MISSED" for limit in self.limits]
        verdicts = (f"{text}  {verdict}" for text, verdict in zip(goal, reached, strict=True))
        return f"{self.name:64} {self.value:8.3g}  goal {', then '.join(verdicts)}"


@dataclass(frozen=True)
class Row:
    """A case and what became of it."""

    case: Case
    measured: Measured | None
    failed: str = ""
    planned_bytes: float | None = None
    """Most bytes of tensors that the planner expects; None where it does not know the case."""
    planned_seconds: float | None = None
    """Of a step; None for a device whose speed the planner does not know."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print tables, and write JSON; 1 when a case failed."""
    arguments = parse_arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    path = arguments.config or (GPU_CONFIG if gpu else CPU_CONFIG)
    seconds = arguments.seconds or (GPU_SECONDS if gpu else CPU_SECONDS)
    started = time.monotonic()
    cases = choose_cases(arguments.micro_batch or (8 if gpu else 4), arguments.only)
    precision = case_config(path, cases[0], tuple(arguments.overrides)).train.precision
    matmul, copy = matmul_tflops(device, DTYPES[precision]), copy_bandwidth(device)
    print(f"{describe_device()}\nmatmul {matmul:.3g} TFLOP/s in {precision}, copy {copy / 1e12:.3g} TB/s; {path}")
    print(f"memory: most {what(device)}; planned: tensors alone\n\n{header()}", flush=True)
    whole = gpu and path == GPU_CONFIG and not arguments.overrides
    rows: list[Row] = []
    for case in cases:
        rows.append(attempt(path, case, tuple(arguments.overrides), device, seconds))
        print(line(rows[-1], matmul), flush=True)
        judged = goals(rows if whole else [], matmul)
        write(arguments.json, rows, judged, matmul, copy)  # now: a later case may end the process
    print(f"\n{shares(rows)}\n\n{largest(rows)}\n")
    print("\n".join(map(str, judged)))
    print(f"{time.monotonic() - started:.0f} s in all")
    return EXIT_FAULT if any(row.failed for row in rows) else EXIT_DONE


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark.py train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="run to take model and optimizer from")
    parser.add_argument("--seconds", type=float, help="to time each case for (default 20 on a GPU, 3 on a CPU)")
    parser.add_argument("--micro-batch", type=int, help="samples per step (default 8 on a GPU, 4 on a CPU)")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--json", type=Path, help="also write everything here")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override a key of the config")
    return parser.parse_args(argv)


def choose_cases(micro_batch: int, only: str = "") -> list[Case]:
    """Both stages without recomputation, the largest batch that selective recomputation is to allow, and fp8.

    Raises:
        MegacogError: No case is left.
    """
    found = [
        Case("sequential", micro_batch), Case("interpolation", micro_batch),
        Case("sequential", 3 * micro_batch, "selective"), Case("sequential", micro_batch, fp8=True),
    ]  # fmt: skip
    chosen = [case for case in found if only in case.name]
    if not chosen:
        raise MegacogError(f"--only {only!r} is part of no case: " + "; ".join(case.name for case in found))
    return chosen


def attempt(path: Path, case: Case, overrides: tuple[str, ...], device: torch.device, seconds: float) -> Row:
    """A row for a case; one that fails says why, and the others are measured all the same."""
    planned = predicted = None
    try:
        config = case_config(path, case, overrides)
        planned = plan_peak(config, 1, case.policy, case.micro_batch, device.type == "cuda")
        predicted = predict_seconds(config, device)
        return Row(case, measure(config, case, device, seconds), "", planned, predicted)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return Row(case, None, why, planned, predicted)


def predict_seconds(config: Config, device: torch.device) -> float | None:
    """The planner's time of a step on this device; None if it is none of those that the planner knows."""
    if device.type != "cuda":
        return None
    memory_gib = torch.cuda.get_device_properties(device).total_memory / GIB
    try:
        known = find_device(device_name(), memory_gib, config.train.precision)
    except ConfigError:
        return None
    return plan(config, Cluster(known, 1, 1), (), suggest=False).seconds


def header() -> str:
    columns = f"{'step s':>8} {'planned':>8} {'tokens/s':>9} {'model':>8} {'hardware':>8} {'/matmul':>7}"
    columns += f" {'GiB':>7} {'planned':>7}"
    return f"{'case':44} {columns}   model and hardware in TFLOP/s"


def line(row: Row, matmul: float) -> str:
    """One row of the table."""
    found = row.measured
    planned = "" if row.planned_bytes is None else f"{row.planned_bytes / GIB:7.2f}"
    if found is None:
        return f"{row.case.name:44} failed (planned {planned.strip()} GiB): {row.failed}"
    predicted = "" if row.planned_seconds is None else f"{row.planned_seconds:.3f}"
    return (
        f"{row.case.name:44} {found.seconds:8.3f} {predicted:>8} {found.tokens_per_second:9.0f} "
        f"{found.model_tflops:8.3g} {found.hardware_tflops:8.3g} {found.model_tflops / matmul:7.3f} "
        f"{found.peak_bytes / GIB:7.2f} {planned}"
    )


def shares(rows: Sequence[Row]) -> str:
    """Where the device's time goes; idle is of the step."""
    lines = [f"{'share of device time':44} " + " ".join(f"{kind:>9}" for kind in [*KINDS, "unknown", "idle"])]
    for row in rows:
        if row.measured is not None:
            values = [*row.measured.profile.shares.values(), row.measured.idle]
            lines.append(f"{row.case.name:44} " + " ".join(f"{100 * value:7.1f} %" for value in values))
    return "\n".join(lines)


def largest(rows: Sequence[Row], count: int = 8) -> str:
    """The kernels or operators that took most of the first case's step."""
    found = next((row.measured for row in rows if row.measured is not None), None)
    if found is None:
        return "nothing was measured"
    total = sum(found.profile.seconds.values()) + found.profile.unknown
    lines = [f"most time in: {found.case.name}"]
    lines += [f"  {100 * spent / total:5.1f} %  {name[:100]}" for name, spent in found.profile.largest[:count]]
    return "\n".join(lines)


def goals(rows: Sequence[Row], matmul: float) -> list[Goal]:
    """The goals of the 9B model on one H200; without rows, none was run."""
    measured = {row.case: row.measured for row in rows if row.measured is not None}
    tried = {row.case for row in rows}
    plain, windows, selective, fp8 = (
        Case("sequential", 8), Case("interpolation", 8), Case("sequential", 24, "selective"),
        Case("sequential", 8, fp8=True),
    )  # fmt: skip

    def of(case: Case, value: Callable[[Measured], float]) -> float | None:
        return value(measured[case]) if case in measured else None

    def gib(case: Case) -> float | None:
        return float("inf") if case in tried - set(measured) else of(case, lambda found: found.peak_bytes / GIB)

    bytes_off = [
        abs(row.planned_bytes / row.measured.peak_bytes - 1) for row in rows if row.measured and row.planned_bytes
    ]  # fmt: skip
    seconds_off = [
        abs(row.planned_seconds / row.measured.seconds - 1) for row in rows if row.measured and row.planned_seconds
    ]  # fmt: skip
    speed_up = None
    if plain in measured and fp8 in measured:
        speed_up = measured[fp8].tokens_per_second / measured[plain].tokens_per_second
    return [
        Goal(f"{plain.name}: model TFLOP/s / matmul", (0.63, 0.75), True, of(plain, lambda m: m.model_tflops / matmul)),
        Goal(f"{windows.name}: model TFLOP/s / matmul", (0.63,), True, of(windows, lambda m: m.model_tflops / matmul)),
        Goal(f"{plain.name}: GiB", (MEMORY_LIMIT / GIB,), False, gib(plain)),
        Goal(f"{selective.name}: GiB", (MEMORY_LIMIT / GIB,), False, gib(selective)),
        Goal("planned memory off the measured, worst case", (0.08,), False, max(bytes_off, default=None)),
        Goal("predicted step time off the measured, worst case", (0.15,), False, max(seconds_off, default=None)),
        Goal("head and loss: share of device time", (0.015,), False, of(plain, lambda m: m.profile.shares["head"])),
        Goal("fp8 base / bf16: tokens/s", (1.15, 1.3), True, speed_up),
        Goal(
            f"tokens/s / the original's {ORIGINAL_TOKENS_PER_SECOND} per GPU", (30,), True,
            of(plain, lambda m: m.tokens_per_second / ORIGINAL_TOKENS_PER_SECOND),
        ),
    ]  # fmt: skip


def write(path: Path | None, rows: Sequence[Row], judged: Sequence[Goal], matmul: float, copy: float) -> None:
    """Everything as JSON, if a file was asked for."""
    if path is None:
        return
    found: dict[str, Any] = {
        "device": describe_device(), "matmul_tflops": matmul, "copy_bytes_per_second": copy,
        "rows": [as_json(row) for row in rows], "goals": [asdict(goal) for goal in judged],
    }  # fmt: skip
    write_json(path, found)


def as_json(row: Row) -> dict[str, Any]:
    """A row with what follows from it."""
    found = row.measured
    planned = {"planned_bytes": row.planned_bytes, "planned_seconds": row.planned_seconds}
    if found is None:
        return {"case": row.case.name, "failed": row.failed} | planned
    return {
        **asdict(found), **planned, "case": row.case.name, "model_tflops": found.model_tflops,
        "hardware_tflops": found.hardware_tflops, "attention_tflops": found.attention_tflops,
        "shares": found.profile.shares, "idle": found.idle,
    }  # fmt: skip


if __name__ == "__main__":
    run(main)
