"""Checkpoints of a running loop: training goes on while they are written, and after a failure if it may."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import steps_in
from tiny_run import make_inputs, settings, write_config

from megacog.checkpoint import records
from megacog.errors import CheckpointError, ConfigError
from megacog.metrics.record import read_records
from megacog.runtime import outcome
from megacog.training import pretrain
from megacog.training.loop import Loop

STEPS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def run(inputs: Path, run_dir: Path, checkpoint: dict[str, Any], **train: Any) -> int:
    values = settings(inputs, run_dir, "base", engine="torch", **({"steps": STEPS, "eval_every": 0} | train))
    values["checkpoint"] = {"every": 1, "keep_last": 9} | checkpoint
    return pretrain.main(["--config", str(write_config(run_dir.with_suffix(".yaml"), values))])


def of_kind(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == kind]


def fail_at(monkeypatch: pytest.MonkeyPatch, failing: Callable[[Path], bool]) -> None:
    """No space for the files of some checkpoints."""
    save_tensors = records.save_tensors

    def full(tensors: Any, path: Path) -> None:
        if failing(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_tensors(tensors, path)

    monkeypatch.setattr(records, "save_tensors", full)


def test_steps_go_on_while_a_checkpoint_is_written(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, save_tensors, train_step = threading.Event(), records.save_tensors, Loop.train_step

    def wait(tensors: Any, path: Path) -> None:
        assert "step-0000002" not in str(path) or written.wait(300)
        save_tensors(tensors, path)

    def release(self: Loop, batches: Any, step: int) -> Any:
        if step == 4:
            assert self.checkpoints.writing
            written.set()
        return train_step(self, batches, step)

    monkeypatch.setattr(records, "save_tensors", wait)
    monkeypatch.setattr(Loop, "train_step", release)
    assert run(inputs, tmp_path / "run", {"every": 2}, steps=6) == 0
    told = [(record["kind"], record["step"]) for record in read_records(tmp_path / "run/metrics.jsonl")]
    assert told.index(("train", 3)) < told.index(("checkpoint", 2)) < told.index(("checkpoint", 4))
    assert steps_in(tmp_path / "run") == [2, 4, 6]


def test_a_checkpoint_is_completed_at_a_later_step_without_another_one(inputs: Path, tmp_path: Path) -> None:
    assert run(inputs, tmp_path / "run", {"every": 2}, steps=30, learning_rate=1e-4) == 0
    told = [(record["kind"], record["step"]) for record in read_records(tmp_path / "run/metrics.jsonl")]
    assert [step for kind, step in told if kind == "checkpoint"] == list(range(2, 31, 2))
    record = of_kind(tmp_path / "run", "checkpoint")[0]
    files = [*(tmp_path / "run/checkpoints/step-0000030").glob("*.safetensors")]
    assert record["bytes"] == sum(file.stat().st_size for file in files)
    assert 0 < record["stall_seconds"] <= record["seconds"] + 0.5
    assert record["bytes_per_second"] == pytest.approx(record["bytes"] / record["seconds"])


def test_a_supervisor_learns_of_the_newest_complete_checkpoint(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(outcome.VARIABLE, str(tmp_path))
    fail_at(monkeypatch, lambda path: "step-0000002" in str(path))
    with pytest.raises(CheckpointError):
        run(inputs, tmp_path / "run", {"asynchronous": False})
    assert outcome.reached(tmp_path) == "step-0000001"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_with_continue_a_failed_checkpoint_costs_only_itself(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    fail_at(monkeypatch, lambda path: "step-0000002" in str(path))
    assert run(inputs, tmp_path / "run", {"on_error": "continue", "asynchronous": asynchronous}) == 0
    assert steps_in(tmp_path / "run") == [1, 3, 4]
    told = of_kind(tmp_path / "run", "checkpoint")
    assert [record["step"] for record in told] == [1, 2, 3, 4]
    assert [record["failures"] for record in told] == [0, 1, 1, 1]
    assert "No space left on device (ENOSPC)" in told[1]["error"]


@pytest.mark.parametrize(("failing", "on_error"), [("step-0000002", "stop"), (f"step-{STEPS:07d}", "continue")])
def test_with_stop_a_failed_checkpoint_ends_the_run_and_the_last_one_must_always_be_written(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, on_error: str
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, lambda path: failing in str(path))
        with pytest.raises(CheckpointError, match=f"{failing}.*rank 0 on .*ENOSPC"):
            run(inputs, tmp_path / "run", {"on_error": on_error})
    assert failing not in {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert not (tmp_path / "run/export").exists()
    assert run(inputs, tmp_path / "run", {}) == 0, "and the run can be resumed"
    assert steps_in(tmp_path / "run")[-1] == STEPS


def test_the_best_by_evaluation_stays_and_needs_evaluations(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_best needs data.eval and an evaluation at every checkpoint"):
        run(inputs, tmp_path / "run", {"every": 3, "keep_best": 1}, eval_every=2)
    assert run(inputs, tmp_path / "run", {"keep_last": 1, "keep_best": 1}, eval_every=1, learning_rate=5.0) == 0
    losses = {record["step"]: record["loss"] for record in of_kind(tmp_path / "run", "eval")}
    best = min((step for step in losses if isinstance(losses[step], float)), key=lambda step: losses[step])
    assert steps_in(tmp_path / "run") == sorted({best, STEPS})
    assert (tmp_path / "run/checkpoints/best").read_text() == f"step-{best:07d}\n"
