"""Whole training runs on two ranks: evaluation, sample clips and skipped steps under DeepSpeed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from run_ranks import run_ranks
from tiny_run import make_inputs, settings, write_config

from megacog.checkpoint.discovery import find_checkpoint
from megacog.checkpoint.export import open_export
from megacog.checkpoint.records import RecordReader
from megacog.metrics.record import read_records
from megacog.training import pretrain

pytestmark = pytest.mark.distributed
PROMPT = "the digit 3 moves left"
ENGINES = {"torch": ("torch", 0)} | {f"zero-{stage}": ("deepspeed", stage) for stage in (0, 1, 2, 3)}
"""Name -> train.engine, train.zero_stage."""
BAD_STEPS = [1, 3, 5, 6, 7, 8, 9]


class Runs:
    """Small runs of the sequential stage below one folder; all with two ranks share two processes.

    Args:
        folder: Gets `<name>.yaml` and the run folder `<name>` of every run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = make_inputs(folder / "inputs")
        self.base = folder / "base"
        self.one_rank(settings(self.inputs, self.base, "base", engine="torch", steps=1, eval_every=0))
        self.outcomes: list[dict[str, Any]] = []

    def values(self, name: str, engine: str, samples: bool, dropout: float = 0.0, **train: Any) -> dict[str, Any]:
        kind, zero_stage = ENGINES[engine]
        # The learning rate is small, so that differences of rounding do not grow.
        options = {"engine": kind, "zero_stage": zero_stage, "steps": 4, "learning_rate": 1e-3} | train
        values = settings(self.inputs, self.folder / name, **options)
        values["model"] |= {"inherit": str(self.base / "export"), "mlp_dropout": dropout}
        if samples:
            values["samples"] = {"every": 2, "prompts": [PROMPT]}
        if zero_stage == 3:  # small tensors would otherwise stay whole
            values["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        return values

    def add(self, name: str, values: dict[str, Any], bad_steps: list[int] | None = None) -> None:
        write_config(self.folder / f"{name}.yaml", values)
        if bad_steps is not None:
            (self.folder / f"{name}.bad.json").write_text(json.dumps(bad_steps))

    def one_rank(self, values: dict[str, Any]) -> None:
        folder = self.folder / "one-rank"
        folder.mkdir(exist_ok=True)
        assert pretrain.main(["--config", str(write_config(folder / "config.yaml", values))]) == 0

    def two_ranks(self) -> None:
        """Run everything that was added."""
        finished = run_ranks(["tests/rank_jobs.py", "pretrain_all", str(self.folder)], 2, self.folder / "logs")
        finished.assert_success()
        self.outcomes = json.loads((self.folder / "result.json").read_text())

    def records(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [record for record in read_records(self.folder / name / "metrics.jsonl") if record["kind"] == kind]

    def numbers(self, name: str) -> list[tuple[Any, ...]]:
        """What a step's training must not differ in."""
        keys = ("step", "loss", "frame_loss", "grad_norm")
        return [tuple(record[key] for key in keys) for record in self.records(name, "train")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    runs.one_rank(runs.values("alone", "torch", samples=True, eval_every=2))
    for engine in ("zero-1", "zero-3"):
        runs.add(f"{engine}-watched", runs.values(f"{engine}-watched", engine, samples=True, eval_every=2))
        for name, busy in ((f"{engine}-busy", True), (f"{engine}-quiet", False)):
            every = 2 if busy else 0
            runs.add(name, runs.values(name, engine, samples=busy, dropout=0.1, eval_every=every))
    for engine in ENGINES:
        values = runs.values(f"{engine}-bad", engine, samples=False, steps=12, eval_every=0)
        runs.add(f"{engine}-bad", values, BAD_STEPS)
    runs.two_ranks()
    return runs


@pytest.mark.parametrize("engine", ["zero-1", "zero-3"])
def test_evaluation_and_samples_of_two_ranks_are_those_of_one(runs: Runs, engine: str) -> None:
    name = f"{engine}-watched"
    expected, found = runs.records("alone", "eval"), runs.records(name, "eval")
    assert [record["step"] for record in found] == [record["step"] for record in expected] == [2, 4]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["frame_loss"] == pytest.approx(other["frame_loss"], rel=1e-5)
    for step in (2, 4):
        place = Path("samples") / f"step-{step:07d}"
        for file in ("contact_sheet.png", "00.gif"):
            mine, theirs = (runs.folder / run / place / file for run in (name, "alone"))
            assert mine.read_bytes() == theirs.read_bytes(), file


@pytest.mark.parametrize("engine", ["zero-1", "zero-3"])
def test_evaluation_and_samples_on_two_ranks_do_not_disturb_training(runs: Runs, engine: str) -> None:
    busy, quiet = f"{engine}-busy", f"{engine}-quiet"
    assert len(runs.records(busy, "eval")) == 2 and not runs.records(quiet, "eval")
    assert (runs.folder / busy / "samples/step-0000004/contact_sheet.png").is_file()
    assert not (runs.folder / quiet / "samples").exists()
    assert runs.numbers(busy) == runs.numbers(quiet)
    mine, theirs = (open_export(runs.folder / name / "export") for name in (busy, quiet))
    assert mine.files.keys() == theirs.files.keys()
    assert all(torch.equal(mine.tensor(tensor), theirs.tensor(tensor)) for tensor in mine.files)
    for rank in range(2):
        states = [generators(runs.folder / name, rank) for name in (busy, quiet)]
        assert all(torch.equal(states[0][kind], states[1][kind]) for kind in ("torch", "numpy", "python"))


def generators(run_dir: Path, rank: int) -> dict[str, torch.Tensor]:
    """States of a rank's random number generators at the end of a run."""
    found = find_checkpoint(run_dir, "must")
    assert found is not None
    return RecordReader(found[0], found[1].parameters).read(f"rng/{rank:05d}")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_batch_of_one_rank_is_skipped_by_all_and_five_in_a_row_end_the_run(runs: Runs, engine: str) -> None:
    name = f"{engine}-bad"
    for rank, outcomes in enumerate(runs.outcomes):
        outcome = outcomes[name]
        assert outcome["changed"] == [2, 4], f"rank {rank}: weights and states change in the other steps, only"
        assert outcome["error"].startswith("step 9: loss nan, gradient norm ")
        assert "5 steps in a row were not finite; stopped" in outcome["error"]
        assert "train-" in outcome["error"], "the samples are named"
    records = runs.records(name, "train")
    assert [record["applied"] for record in records] == [step not in BAD_STEPS for step in range(1, 9)]
    for record, expected in zip(records, runs.records("torch-bad", "train"), strict=True):
        if record["applied"]:
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
            assert math.isfinite(record["grad_norm"])
        else:
            assert record["loss"] == "nan" and record["grad_norm"] in ("nan", "inf")
