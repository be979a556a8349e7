"""What an asynchronous checkpoint holds is the state of its step, whatever the engine does meanwhile."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from run_ranks import one_rank

from megacog.checkpoint.discovery import find_checkpoint
from megacog.checkpoint.records import RecordReader, Snapshot
from megacog.parallel.groups import build_process_groups
from megacog.training.comparison import run_step, small_config
from megacog.training.elastic import start_small


@pytest.mark.parametrize(
    ("engine", "zero_stage", "precision"),
    [("torch", 0, "fp32"), ("torch", 0, "bf16"), ("deepspeed", 0, "fp32"), ("deepspeed", 1, "bf16"),
     ("deepspeed", 2, "fp32"), ("deepspeed", 3, "fp32")],
)  # fmt: skip
def test_the_next_step_does_not_reach_a_checkpoint_that_is_still_being_copied(
    engine: str, zero_stage: int, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Snapshot.copy

    def slow(self: Snapshot) -> None:
        time.sleep(0.5)
        copy(self)

    monkeypatch.setattr(Snapshot, "copy", slow)
    with one_rank():
        config = small_config(engine, zero_stage, 1, 3, precision)
        config = config.model_copy(update={"train": config.train.model_copy(update={"run_dir": str(tmp_path)})})
        groups = build_process_groups(1)
        running, state = start_small(config, groups, None)
        run_step(running, config, groups, 1)
        trained = [name for name, parameter in running.model.named_parameters() if parameter.requires_grad]
        expected = {
            name: {field: tensor.clone() for field, tensor in running.get_state(name).items()} for name in trained
        }
        state.start_save(1)
        run_step(running, config, groups, 2)
        state.finish_save()
        moments = {name: running.get_state(name)["exp_avg_sq"] for name in trained}
        found = find_checkpoint(tmp_path, "must")
    assert found is not None and not any(torch.equal(moments[name], expected[name]["exp_avg_sq"]) for name in trained)
    reader = RecordReader(found[0], found[1].parameters)
    for name in trained:
        saved = reader.read(name)
        assert saved.keys() == expected[name].keys()
        assert [field for field in saved if not torch.equal(saved[field], expected[name][field])] == []
