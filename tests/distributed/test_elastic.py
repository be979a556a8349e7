"""A checkpoint of any layout of ranks is resumed on any other; the full matrix is `launch/prove.py elastic`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_ranks import made_once, one_rank, run_jobs

from megacog.checkpoint import export
from megacog.checkpoint.discovery import find_checkpoint
from megacog.errors import CheckpointError
from megacog.parallel.groups import build_process_groups
from megacog.training.comparison import small_config
from megacog.training.elastic import TOLERANCE, Layout, resume_all, save_all, start_small
from megacog.training.engine import Engine

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
# engine-ZeRO-tensor-sequence-data: ranks and stages change in both directions, and tensor parallelism comes and goes.
ALONE = ["deepspeed-1-1-1-1", "deepspeed-3-1-1-1"]
JOB = (
    "elastic:deepspeed-2-1-1-2+deepspeed-1-2-1-1,deepspeed-1-1-1-1>deepspeed-3-1-1-2,"
    "deepspeed-3-1-1-1>deepspeed-2-2-1-1,deepspeed-2-1-1-2>deepspeed-1-2-1-1,deepspeed-1-2-1-1>deepspeed-3-1-1-2,"
    "deepspeed-1-2-1-1>deepspeed-2-1-2-1"
)
BACK = [("deepspeed-2-1-1-2", "deepspeed-3-1-1-1"), ("deepspeed-1-2-1-1", "torch-0-1-1-1")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return json.loads((made_once(tmp_path_factory, "elastic", resume_everywhere) / "rows.json").read_text())


def resume_everywhere(folder: Path) -> None:
    """Save on one rank and on two, resume on two and on one."""
    with one_rank():
        save_all(folder, map(Layout.parse, ALONE))
    per_rank = run_jobs([JOB], 2, folder, timeout=480)[JOB]
    with one_rank():
        back = resume_all(folder, [(Layout.parse(one), Layout.parse(other)) for one, other in BACK])
    rows = per_rank[0]["rows"] + per_rank[1]["rows"] + [dataclasses.asdict(row) for row in back]
    (folder / "rows.json").write_text(json.dumps(rows))


def test_weights_masters_and_moments_are_bitwise_those_saved(results: list[dict[str, Any]]) -> None:
    assert len(results) == 2 * 5 + len(BACK)
    assert [row for row in results if not row["bitwise"]] == []


def test_the_next_loss_is_that_of_the_run_that_saved(results: list[dict[str, Any]]) -> None:
    assert [row for row in results if not row["loss"] <= TOLERANCE] == []


def test_a_state_that_did_not_arrive_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout.parse("torch-0-1-1-1")
    with one_rank():
        save_all(tmp_path, [layout])
        config = small_config("torch", 0, 1, 3)
        train = config.train.model_copy(update={"run_dir": str(tmp_path / str(layout))})
        found = find_checkpoint(tmp_path / str(layout), "must")
        forget_one(monkeypatch)
        with pytest.raises(CheckpointError, match="exp_avg_sq of plus.sequential.layers.1.dense.weight"):
            start_small(config.model_copy(update={"train": train}), build_process_groups(1), found)


def test_a_scale_of_the_fp8_base_that_did_not_arrive_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_rank():
        config = small_config("torch", 0, 1, 3, "bf16")
        train = config.train.model_copy(update={"run_dir": str(tmp_path), "base_precision": "fp8"})
        config = config.model_copy(update={"train": train})
        _, state = start_small(config, build_process_groups(1), None)
        state.save(1)
        found = find_checkpoint(tmp_path, "must")
        start_small(config, build_process_groups(1), found)
        load = export.load_weight

        def lossy(layer: torch.nn.Module, weight: torch.Tensor) -> None:
            load(layer, weight)
            layer.get_buffer("weight_scale")[-1] ^= 1 << 23  # the scale's exponent

        monkeypatch.setattr(export, "load_weight", lossy)
        with pytest.raises(CheckpointError, match="weight_scale of layers.1.mlp.down.weight"):
            start_small(config, build_process_groups(1), found)


def forget_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine lose one bit of one moment."""
    from megacog.training.plain_engine import PlainEngine

    set_state = PlainEngine.set_state

    def lossy(self: Engine, name: str, state: dict[str, torch.Tensor]) -> None:
        if name == "plus.sequential.layers.1.dense.weight":
            moment = state["exp_avg_sq"].clone()
            moment.view(torch.int32).view(-1)[0] ^= 1
            state = state | {"exp_avg_sq": moment}
        set_state(self, name, state)  # type: ignore[arg-type]

    monkeypatch.setattr(PlainEngine, "set_state", lossy)
