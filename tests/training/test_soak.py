"""What `launch/soak.py` makes of its records, and that it notices what it is there to notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_ranks import ROOT, python_environment

from megacog.errors import DataError
from megacog.training import soak_goodput, soak_kills, soak_steps, soak_trials
from megacog.training.soak_goodput import Stretch, Turns
from megacog.training.soak_record import SoakRecord, quantile
from megacog.training.soak_runs import STEPS, Failed, all_layouts, look_at


def test_a_record_outlives_a_torn_line_and_keeps_soaks_apart(tmp_path: Path) -> None:
    record = SoakRecord(tmp_path / "made/record.jsonl", "kills")
    record.begin({"kills": "3"})
    record.add("trial", trial=0)
    SoakRecord(record.path, "steps").add("look", step=1)
    with open(record.path, "a") as file:
        file.write('{"soak": "kills", "event": "tri')
    assert [line["event"] for line in record.lines()] == ["start", "trial"]
    assert next(record.lines("start"))["machine"]["torch"]
    with open(record.path, "a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"record.jsonl:4 is no line of a soak record"):
        list(record.lines())


def test_a_quantile_is_one_of_the_values() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], share) for share in (0.0, 0.5, 0.75, 0.95, 1.0)] == [1, 2, 3, 4, 4]


def trial(number: int, layout: str, lost: list[int], failure: str | None = None, **kill: Any) -> dict[str, Any]:
    base = {"whom": "all", "phase": "save", "ended_seconds": None}
    kills = [base | {"lost": steps} | kill for steps in lost]
    line = {"event": "trial", "trial": number, "layout": layout, "start": "fork", "kills": kills, "failure": failure}
    return line


def test_kills_are_counted_with_what_was_lost_and_what_failed() -> None:
    lines = [
        {"event": "begin", "trial": 0}, {"event": "begin", "trial": 0}, {"event": "begin", "trial": 1},
        trial(0, "zero1-1-sync-base", [0, 2]),
        trial(1, "zero3-2-data-async-base", [3], "weights differ", whom="rank 1", phase="step", ended_seconds=0.5),
    ]  # fmt: skip
    assert soak_trials.count_kills(lines) == 3 and len(soak_trials.failures(lines)) == 1
    text = soak_trials.summary(lines)
    assert "3 kills in 2 runs, 1 runs ended bit for bit as undisturbed ones, 1 failures; 1 runs that" in text
    assert "killed: all 2, rank 1 1" in text and "while: save 2, step 1" in text
    assert "sync saves every 2 steps: mean 1.00, most 2 (0 1, 2 1)" in text and "most 3 (3 1)" in text
    assert "median 0.50, 95 % 0.50, most 0.50 of 1" in text and "FAILED trial 1: weights differ" in text


def test_the_mix_has_every_engine_world_way_of_saving_and_stage() -> None:
    layouts = all_layouts()
    assert len(layouts) == len(set(map(str, layouts))) == 44
    assert {(x.engine, x.zero_stage) for x in layouts} == {("torch", 0), *(("deepspeed", zero) for zero in (1, 2, 3))}
    assert {(x.ranks, x.tensor, x.asynchronous, x.stage) for x in layouts[:32]} == {
        (ranks, tensor, way, stage)
        for ranks, tensor in ((1, 1), (2, 1), (2, 2)) for way in (True, False) for stage in ("base", "sequential")
    }  # fmt: skip


def finished_run(folder: Path) -> Path:
    (folder / "checkpoints/step-0000012").mkdir(parents=True)
    (folder / "checkpoints/step-0000012/records.safetensors").write_bytes(b"weights")
    (folder / "export").mkdir()
    lines = [{"step": step, "kind": "train", "loss": 1 / step, "seconds": step} for step in range(1, STEPS + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_are_compared_by_all_but_times(tmp_path: Path) -> None:
    first, second = look_at(finished_run(tmp_path / "a")), finished_run(tmp_path / "b")
    metrics = second / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text.replace('"seconds": 3', '"seconds": 9'))
    assert look_at(second) == first
    metrics.write_text(text.replace('"loss": 0.5', '"loss": 0.5000000000000001'))
    assert look_at(second).metrics != first.metrics
    (second / "checkpoints/step-0000012/records.safetensors").write_bytes(b"Weights")
    assert look_at(second).files != first.files
    metrics.write_text(text + text.splitlines()[-1] + "\n")
    with pytest.raises(Failed, match="metrics have steps"):
        look_at(second)
    (second / "checkpoints/.step-0000012.tmp-1").mkdir()
    with pytest.raises(Failed, match=r"left over: \.step-0000012\.tmp-1"):
        look_at(second)


def looks(slope: float, pid: int = 1, files: int = 30, start: int = 0) -> list[dict[str, Any]]:
    """Memory that jumps in the beginning, and then grows by `slope` MB in 1,000 steps."""
    return [
        {
            "event": "look", "pid": pid, "step": start + step, "open_files": files + (step % 20 == 0),
            "anonymous_mb": (100 if step else 50) + slope * step / 1000, "checkpoints": 3, "checkpoint_mb": 1.5,
        }
        for step in range(0, 5000, 10)
    ]  # fmt: skip


def test_what_grows_is_told_in_any_process_of_an_interrupted_soak() -> None:
    assert soak_steps.grows([]) is None and soak_steps.summary([]) == "nothing is recorded"
    steady = looks(0.01)
    assert soak_steps.grows(steady) is None
    assert "slope +0.010 MB per 1,000 steps; open files 30 to 31" in soak_steps.summary(steady)
    assert soak_steps.grows(looks(2.0)) == "memory"
    two = steady + looks(0.01, pid=2, start=5000)
    assert soak_steps.grows(two) is None and len(soak_steps.processes(two)) == 2
    leaking = [line | {"open_files": line["step"] // 100} for line in steady]
    assert soak_steps.grows(leaking) == "open files"


def test_goodput_leaves_the_restart_out_and_counts_everything_else() -> None:
    records = [{"step": step, "time": 2.0 * step, "seconds": 1.5, "data_wait": 0.2} for step in range(1, 21)]
    cpu = [(step, 1.0 * step) for step in range(21)]
    pauses = Turns(None, 5.0, [(1.0, 2.0), (9.0, 11.0), (20.5, 22.5), (39.0, 99.0)]).within  # type: ignore[arg-type]
    assert Stretch.between(records, cpu, 5, pauses) == Stretch(15, 26.0, pytest.approx(14.0), pytest.approx(15.0))
    stretch = Stretch.between(records, cpu, 5, lambda *_: 0.0)
    assert stretch == Stretch(steps=15, seconds=30.0, step_seconds=pytest.approx(18.0), cpu_seconds=pytest.approx(15.0))
    line = {
        "bare": {"steps": 9, "seconds": 1.9, "cpu_seconds": 0.95}, "turns": 4, "stretches": [vars(stretch)] * 2,
        "lost": 3, "restart_seconds": 7.0, "save_every": 4,
    }  # fmt: skip
    found = soak_goodput.goodput(line)
    assert found == {k: pytest.approx(v) for k, v in {"clock": 0.95, "processor": 0.95, "in steps": 0.6}.items()}
    assert "3 steps lost, made again 7.0 s after it" in soak_goodput.summary(line)


def test_a_run_that_started_anew_or_elsewhere_is_no_success(tmp_path: Path) -> None:
    trial = object.__new__(soak_kills._Trial)
    trial._folder, trial._starts, trial._checkpoint = tmp_path, 1, 4
    log = tmp_path / "start-0.log"
    for text, failure in (
        ("resumed at step 4 from x", None), ("", None), ("resumed at step 2 from x", "resumed at"),
        ("step 1/12 | loss 3", "started anew"),
    ):  # fmt: skip
        log.write_text(text)
        if failure is None:
            trial._check_start()
        else:
            with pytest.raises(Failed, match=failure):
                trial._check_start()


def soak(name: str, record: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/soak.py", name, "--record", str(record), *options]
    return subprocess.run(command, cwd=ROOT, env=python_environment(), capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_steps_are_looked_at_while_they_run_and_an_interrupted_soak_goes_on(tmp_path: Path) -> None:
    for steps in ("40", "80"):
        result = soak("steps", tmp_path / "r.jsonl", "--steps", steps, "--every", "10", "--seconds", "0.2")
        assert "memory" in result.stdout and "checkpoints" in result.stdout, result.stdout + result.stderr
    lines = list(SoakRecord(tmp_path / "r.jsonl", "steps").lines("look"))
    assert len({line["pid"] for line in lines}) == 2 and max(line["checkpoints"] for line in lines) in (3, 4, 5)
    assert "resumed at step 40" in (tmp_path / "r.run/log.txt").read_text()


@pytest.mark.slow
def test_goodput_is_measured_through_a_kill(tmp_path: Path) -> None:
    result = soak("goodput", tmp_path / "r.jsonl", "--minutes", "0.1", "--width", "32", "--engine", "torch")
    assert "by the clock (goal 0.97)" in result.stdout, result.stdout + result.stderr
    (line,) = SoakRecord(tmp_path / "r.jsonl", "goodput").lines("end")
    assert len(line["stretches"]) == 2 and line["lost"] >= 0 < line["restart_seconds"]
    assert line["turns"] >= 3 and line["bare"]["steps"] > 10
