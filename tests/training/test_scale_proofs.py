"""`launch/prove.py predict` and `memorize` at toy size."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from measured_steps import MEASURED, TINY

from megacog.errors import EnvError
from megacog.runtime.signals import StopFlag
from megacog.training import memorize, predict
from megacog.training.measure import Measured


def test_a_line_through_two_depths_predicts_the_third() -> None:
    def at(seconds: float, gib: float) -> Measured:
        return replace(MEASURED, seconds=seconds, peak_bytes=int(gib * 2**30))

    time, memory = predict.predict([6, 12, 48], [at(0.2, 40.0), at(0.3, 50.0), at(0.92, 110.0)])
    assert time.predicted == pytest.approx(0.9) and time.accepted and time.error == pytest.approx(-0.0217, abs=1e-3)
    assert memory.predicted == pytest.approx(110.0) and memory.accepted and "reached" in str(memory)
    _, memory = predict.predict([6, 12, 48], [at(0.2, 40.0), at(0.3, 50.0), at(0.92, 120.0)])
    assert not memory.accepted and "MISSED" in str(memory) and "-8.33%" in str(memory)


def test_three_depths_are_measured_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "predict.json"
    arguments = ["--layers", "1", "2", "3", "--micro-batch", "2", "--seconds", "0.01", "--json", str(out)]
    code = predict.main([*arguments, *TINY])
    assert "   3 layers: " in capsys.readouterr().out
    found = json.loads(out.read_text())["predictions"]
    assert [row["name"] for row in found] == ["seconds per step", "peak memory in GiB"]
    assert code == (0 if all(abs(row["error"]) <= 0.03 for row in found) else 1)


def run_memorize(tmp_path: Path, *more: str) -> tuple[int, Path, Path]:
    out, run_dir = tmp_path / "memorize.json", tmp_path / "run"
    arguments = [str(run_dir), "--clips", "4", "--micro-batch", "2", "--steps", "60", "--save-at", "9"]
    return memorize.main([*arguments, "--json", str(out), *TINY, *more]), run_dir, out


@pytest.mark.slow
def test_clips_are_learned_by_heart_through_a_kill_and_a_bitwise_resume(tmp_path: Path) -> None:
    code, run_dir, out = run_memorize(tmp_path, "train.learning_rate=2e-2", "model.hidden_size=64")
    found = json.loads(out.read_text())
    assert found["first_loss"] > 3.0 > 2.0 > found["last_loss"] and found["steps"] == 60
    assert found["repeated"] == 5 and found["differing"] == 0
    assert code == 0 and found["accepted"] and not run_dir.exists()
    assert found["finished"] and len(found["losses"]) == 60 and found["losses"]["60"] == found["last_loss"]


def test_losses_are_written_as_they_come_and_the_second_process_is_told_when_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both processes as their commands and records."""
    out, commands, versions = tmp_path / "memorize.json", list[list[str]](), list[dict[str, Any]]()

    def process(command: list[str], progress: Callable[[], None]) -> int:
        commands.append(command)
        steps = range(1, 5) if "--die" in command else range(3, 7)
        (tmp_path / "run").mkdir(exist_ok=True)
        records = [{"kind": "train", "step": s, "loss": 5.0 - s, "frame_loss": {}, "grad_norm": 1.0, "seconds": 0.1}
                   for s in steps]  # fmt: skip
        (tmp_path / "run" / memorize.FILE_NAME).write_text("\n".join(map(json.dumps, records)))
        progress()
        versions.append(json.loads(out.read_text()))
        return -9 if "--die" in command else 0

    monkeypatch.setattr(memorize, "follow", process)
    arguments = ["--clips", "2", "--micro-batch", "2", "--steps", "9", "--save-at", "2", "--json", str(out)]
    assert memorize.main([str(tmp_path / "run"), *arguments, "--seconds", "60"]) == 0
    first, second = versions
    assert first == {"finished": False, "killed_after": None, "losses": {str(s): 5.0 - s for s in range(1, 5)}}
    assert second["killed_after"] == 4 and set(second["losses"]) == set("123456")
    found = json.loads(out.read_text())
    assert found["finished"] and found["accepted"] and found["repeated"] == 2 and found["steps"] == 6
    assert "--until" not in commands[0]
    assert 0 < float(commands[1][commands[1].index("--until") + 1]) - time.monotonic() <= 60


def test_progress_is_written_while_a_process_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorize, "_JSON_SECONDS", 0.05)
    calls: list[float] = []
    command = [sys.executable, "-c", "import sys, time; time.sleep(0.5); sys.exit(3)"]
    assert memorize.follow(command, lambda: calls.append(time.monotonic())) == 3
    assert len(calls) >= 3 and calls[-1] - calls[0] >= 0.2


def test_the_batch_that_is_taken_after_the_end_is_the_last() -> None:
    stop, now = StopFlag(), time.monotonic()
    early = memorize.until(now + 3600, iter("ab"), stop)  # type: ignore[arg-type]
    assert list(early) == ["a", "b"] and not stop.requested
    assert not any(stop.requested for _ in memorize.until(None, iter("ab"), stop))  # type: ignore[arg-type]
    assert next(memorize.until(now - 1, iter("ab"), stop)) == "a" and stop.requested  # type: ignore[arg-type]


def test_steps_that_differ_after_the_kill_or_a_high_loss_are_not_accepted() -> None:
    def record(loss: float) -> memorize.Record:
        return {"loss": loss, "frame_loss": {"f1": loss}, "grad_norm": 1.0, "seconds": 0.1}

    before = {step: record(10.0 - step) for step in range(1, 8)}
    after = {step: record(10.0 - step) for step in range(1, 10)}
    outcome = memorize.compare(before, after, saved=4)
    assert outcome.accepted and (outcome.repeated, outcome.differing) == (3, 0) and outcome.last_loss == 1.0
    assert not memorize.compare(before, after | {6: record(4.0000001)}, saved=4).accepted
    still_high = {step: record(10.0 - step / 2) for step in range(1, 10)}
    assert not memorize.compare(still_high, still_high, saved=4).accepted


def test_a_run_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(EnvError, match="exists; name a new folder"):
        run_memorize(tmp_path)
    assert (tmp_path / "run").exists()
