"""Samples that are left out after a spike, and what files in the run's folder ask for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import make_inputs, settings, write_config

from megacog.config.load import load_config
from megacog.config.schema import Config
from megacog.data.loader import training_batches
from megacog.errors import CheckpointError, ConfigError
from megacog.metrics.record import read_records
from megacog.runtime.signals import StopFlag
from megacog.tokenizers.text import TextTokenizer
from megacog.training import pretrain
from megacog.training.rollback import FILE_NAME, Rollbacks, ShiftedBatches, read_rollbacks
from megacog.training.spikes import Spikes
from megacog.training.switches import SAVE, STOP, Switches, refuse_stopped


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def load(inputs: Path, run_dir: Path, **sections: Any) -> Config:
    values = settings(inputs, run_dir, "base", engine="torch", steps=14, global_batch_size=2, eval_every=0)
    return load_config(write_config(run_dir.with_suffix(".yaml"), values | sections))


def test_steps_after_a_rollback_take_the_samples_after_the_spike() -> None:
    once = Rollbacks().after(spike=20, loss=9.0, checkpoint=16)
    assert [once.shift(step) for step in (1, 16, 17, 30)] == [0, 0, 4, 4]
    twice = once.after(spike=30, loss=9.0, checkpoint=24)  # step 30 took the samples of step 34
    assert [twice.shift(step) for step in (16, 17, 24, 25)] == [0, 4, 4, 10]
    further_back = once.after(spike=18, loss=9.0, checkpoint=8)
    assert [further_back.shift(step) for step in (8, 9, 17)] == [0, 14, 14]


def test_rollbacks_are_kept_and_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path).entries == ()
    rollbacks = Rollbacks().after(20, 9.0, 16)
    rollbacks.write(tmp_path)
    assert read_rollbacks(tmp_path).entries == rollbacks.entries
    (tmp_path / FILE_NAME).write_text('[{"spike": 20}]')
    with pytest.raises(CheckpointError, match=FILE_NAME):
        read_rollbacks(tmp_path)


def test_batches_jump_at_the_checkpoint_wherever_they_start(inputs: Path, tmp_path: Path) -> None:
    config = load(inputs, tmp_path / "run", model={**settings(inputs, tmp_path, "base")["model"], "boi_id": 3})
    text = TextTokenizer.load(inputs / "text")

    def open_at(start: int) -> Any:
        return training_batches(config, text, data_rank=0, data_size=1, start_step=start)

    plain = [next(batches).sample_ids for batches in [open_at(0)] for _ in range(12)]
    rollbacks = Rollbacks().after(spike=5, loss=9.0, checkpoint=3)
    shifted = plain[:3] + plain[5:10]
    for start in (0, 2, 3, 6):
        batches = ShiftedBatches(open_at, rollbacks, start)
        assert [next(batches).sample_ids for _ in range(8 - start)] == shifted[start:]


def run(config: Config) -> int:
    with StopFlag() as stop:
        return pretrain.main(["--config", str(Path(config.train.run_dir).with_suffix(".yaml"))], stop)


def test_a_roll_back_waits_for_files_under_the_limit_of_a_save(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    monkeypatch.setattr(pretrain, "beat", lambda phase, step: told.append((phase, step)))
    checkpoints: Any = SimpleNamespace(complete=lambda: told.append("complete"))
    assert not pretrain.roll_back(load(inputs, tmp_path / "run"), checkpoints, Rollbacks())(7, 9.0), "there is none"
    assert told == [("save", 7), "complete"]


def test_a_run_rolls_back_from_a_spike_and_its_next_start_leaves_the_samples_out(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = {"on_spike": "rollback", "spike_window": 8, "enabled": False}
    config = load(inputs, tmp_path / "run", watch=watch, checkpoint={"every": 3})
    original, calls = Spikes.score, iter(range(1, 100))

    def score(self: Spikes, loss: float) -> float | None:
        return original(self, loss) or (9.0 if next(calls) == 10 else None)  # losses of tiny runs do not spike

    with monkeypatch.context() as context:
        context.setattr(Spikes, "score", score)
        assert run(config) == 85
    (entry,) = read_rollbacks(tmp_path / "run").entries
    assert (entry.spike, entry.checkpoint, entry.shift) == (10, 9, 1)
    assert run(config) == 0
    assert [record["step"] for record in read_records(tmp_path / "run/metrics.jsonl") if record["kind"] == "train"] == [
        *range(1, 15)
    ]


def test_a_stop_file_saves_leaves_and_keeps_the_run_from_starting(inputs: Path, tmp_path: Path) -> None:
    config = load(inputs, tmp_path / "run", watch={"enabled": False})
    refuse_stopped(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / STOP).touch()
    with pytest.raises(ConfigError, match="remove the file"):
        run(config)


def test_files_are_seen_by_rank_0_alone_and_a_save_is_made_once(tmp_path: Path) -> None:
    stop = StopFlag()
    switches, other = (Switches(tmp_path, None, stop, rank) for rank in (0, 1))
    assert not switches.save_requested()
    (tmp_path / SAVE).touch()
    switches._looked -= 1  # a second later
    assert switches.save_requested() and not other.save_requested()
    switches.saved()
    assert not (tmp_path / SAVE).exists() and not stop.requested
    (tmp_path / STOP).touch()
    switches._looked -= 1
    assert not switches.save_requested() and stop.requested and str(tmp_path / STOP) in str(stop.signal_name)


def test_the_time_is_up_after_max_minutes() -> None:
    stop = StopFlag()
    switches = Switches(Path("nowhere"), 0.5, stop, 0)
    switches.save_requested()
    assert not stop.requested
    stop.started -= 30
    late = Switches(Path("nowhere"), 0.5, stop, 0)
    late.save_requested()
    assert stop.requested and stop.signal_name == "train.max_minutes"
