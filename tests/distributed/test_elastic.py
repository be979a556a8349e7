"""A checkpoint of any layout of ranks is resumed on any other; the full matrix is `launch/prove.py elastic`."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from run_ranks import made_once, one_rank

from megacog.checkpoint import export
from megacog.checkpoint.discovery import find_checkpoint
from megacog.errors import CheckpointError
from megacog.parallel.groups import build_process_groups
from megacog.training import elastic
from megacog.training.comparison import small_config
from megacog.training.elastic import (
    TOLERANCE,
    Layout,
    Resumption,
    all_layouts,
    pairwise,
    prove,
    read_rows,
    save_all,
    start_small,
)
from megacog.training.engine import Engine

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
# Up to four ranks; data, tensor and ZeRO change in all directions. Then sequence parallelism and the plain engine.
PAIRS = pairwise([layout for layout in all_layouts([1, 2, 4], [1, 2], [1], [1, 2, 3]) if layout.ranks <= 4]) + [
    (Layout.parse("deepspeed-1-2-1-1"), Layout.parse("deepspeed-2-1-2-1")),
    (Layout.parse("deepspeed-2-1-2-1"), Layout.parse("torch-0-1-1-1")),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Resumption]:
    return read_rows(made_once(tmp_path_factory, "elastic", lambda folder: prove(folder, PAIRS)))


@pytest.mark.slow
def test_weights_masters_and_moments_are_bitwise_those_saved(rows: list[Resumption]) -> None:
    assert len(rows) == len(PAIRS) < 20
    assert [row for row in rows if not row.bitwise] == []


@pytest.mark.slow
def test_the_next_loss_is_that_of_the_run_that_saved(rows: list[Resumption]) -> None:
    assert [row for row in rows if not row.loss <= TOLERANCE] == []


def test_few_pairs_cover_every_two_values_of_a_change() -> None:
    changes = [(vars(saved), vars(resumed)) for saved, resumed in PAIRS]
    for key, values in {"data": {1, 2, 4}, "tensor": {1, 2}, "zero_stage": {1, 2, 3}}.items():
        assert {(saved[key], resumed[key]) for saved, resumed in changes} >= set(itertools.product(values, values))


def test_an_interrupted_proof_goes_on_with_the_pairs_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Layout.parse("torch-0-1-1-1")
    worlds: list[int] = []
    monkeypatch.setattr(elastic, "_run_world", lambda ranks, work: worlds.append(ranks))
    (tmp_path / "rows.jsonl").write_text('{"saved": "torch-0-1-1-1", "resumed": "torch-0-1-1-1", "bitwise": tr')
    elastic._add_row(tmp_path, Resumption(str(alone), str(alone), True, 0.0))
    assert prove(tmp_path, [(alone, alone)]) == [Resumption(str(alone), str(alone), True, 0.0)] and worlds == []
    assert len(prove(tmp_path, [(alone, alone), (alone, Layout.parse("torch-0-1-1-2"))])) == 1
    assert worlds == [1, 2]


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
