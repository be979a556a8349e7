"""Whole training runs on two ranks: evaluation, sample clips and skipped steps under DeepSpeed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from run_ranks import made_once, run_jobs
from tiny_run import make_inputs, settings, write_config

from megacog.checkpoint.discovery import find_checkpoint
from megacog.checkpoint.export import open_export
from megacog.checkpoint.records import RecordReader
from megacog.metrics.record import read_records
from megacog.training import pretrain

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
PROMPT = "the digit 3 moves left"
ENGINES = {"torch": ("torch", 0, 1)} | {f"zero-{stage}": ("deepspeed", stage, 1) for stage in (0, 1, 2, 3)}
ENGINES |= {"sequence": ("deepspeed", 2, 2)}
"""Name -> train.engine, train.zero_stage, parallel.sequence."""
BAD_STEPS = [1, 3, 5, 6, 7, 8, 9]


@dataclass(frozen=True)
class Runs:
    """Finished runs of the sequential stage: `folder/<name>` is the run folder of each."""

    folder: Path

    def outcomes(self, name: str) -> list[dict[str, Any]]:
        """What `pretrain_all` of rank_jobs.py tells of a run, by rank."""
        results = json.loads((self.folder / "result.json").read_text())
        return [result[name] for result in results["pretrain_all"]]

    def records(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [record for record in read_records(self.folder / name / "metrics.jsonl") if record["kind"] == kind]

    def numbers(self, name: str) -> list[tuple[Any, ...]]:
        """What must be equal when two runs train alike."""
        keys = ("step", "loss", "frame_loss", "grad_norm")
        return [tuple(record[key] for key in keys) for record in self.records(name, "train")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(made_once(tmp_path_factory, "runs-on-two-ranks", make_runs))


def make_runs(folder: Path) -> None:
    """A base and the run `alone` in this process; all others on two ranks, which share two processes."""
    inputs = make_inputs(folder / "inputs")
    train_here(folder, settings(inputs, folder / "base", "base", engine="torch", steps=1, eval_every=0))
    train_here(folder, values_of(folder, "alone", "torch", busy=True))
    for engine in ("zero-1", "zero-3"):
        for name, busy, dropout in (("alike", True, 0.0), ("busy", True, 0.1), ("quiet", False, 0.1)):
            name = f"{engine}-{name}"
            write_config(folder / f"{name}.yaml", values_of(folder, name, engine, busy, dropout))
    write_config(folder / "sequence-alike.yaml", values_of(folder, "sequence-alike", "sequence", busy=True))
    for engine in ENGINES:
        name = f"{engine}-bad"
        write_config(folder / f"{name}.yaml", values_of(folder, name, engine, busy=False, steps=12))
        (folder / f"{name}.bad.json").write_text(json.dumps(BAD_STEPS))
    run_jobs(["pretrain_all"], 2, folder, timeout=480)


def values_of(
    folder: Path, name: str, engine: str, busy: bool, dropout: float = 0.0, steps: int = 4
) -> dict[str, Any]:
    """Configuration of a run; a busy one evaluates and samples every two steps, others never."""
    kind, zero_stage, sequence = ENGINES[engine]
    values = settings(
        folder / "inputs", folder / name, engine=kind, zero_stage=zero_stage, steps=steps,
        eval_every=2 if busy else 0, learning_rate=1e-3,  # small: differences of rounding must not grow
    )  # fmt: skip
    values["model"] |= {"inherit": str(folder / "base/export"), "mlp_dropout": dropout}
    values["parallel"] = {"sequence": sequence}
    if busy:
        values["samples"] = {"every": 2, "prompts": [PROMPT]}
    if zero_stage == 3:  # small tensors would otherwise stay whole
        values["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return values


def train_here(folder: Path, values: dict[str, Any]) -> None:
    config = write_config(folder / "inputs/one-rank.yaml", values)
    assert pretrain.main(["--config", str(config)]) == 0


@pytest.mark.parametrize("engine", ["zero-1", "zero-3", "sequence"])
def test_steps_evaluation_samples_and_export_of_two_ranks_are_those_of_one(runs: Runs, engine: str) -> None:
    name = f"{engine}-alike"
    for mine, theirs in zip(runs.numbers(name), runs.numbers("alone"), strict=True):
        assert mine[0] == theirs[0] and mine[1] == pytest.approx(theirs[1], rel=1e-5)
        assert mine[2] == pytest.approx(theirs[2], rel=1e-5) and mine[3] == pytest.approx(theirs[3], rel=1e-4)
    expected, found = runs.records("alone", "eval"), runs.records(name, "eval")
    assert [record["step"] for record in found] == [record["step"] for record in expected] == [2, 4]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["frame_loss"] == pytest.approx(other["frame_loss"], rel=1e-5)
    for step in (2, 4):
        for file in ("contact_sheet.png", "00.gif"):
            place = Path(f"samples/step-{step:07d}", file)
            images = [(runs.folder / run / place).read_bytes() for run in (name, "alone")]
            assert images[0] == images[1], place
    exports = [open_export(runs.folder / run / "export") for run in (name, "alone")]
    for tensor in exports[1].files:
        torch.testing.assert_close(exports[0].tensor(tensor), exports[1].tensor(tensor), rtol=1e-3, atol=1e-5)


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
    for rank, outcome in enumerate(runs.outcomes(name)):
        assert outcome["changed"] == [2, 4], "weights or optimizer states changed in a skipped step"
        assert outcome["error"].startswith("step 9: loss nan, gradient norm ")
        assert "5 steps in a row were not finite; stopped" in outcome["error"]
        assert ("train-" in outcome["error"]) == (rank == 1), "the samples are named by the rank that has them"
        assert ("samples: not those of this rank" in outcome["error"]) == (rank == 0)
    records = runs.records(name, "train")
    assert [record["applied"] for record in records] == [step not in BAD_STEPS for step in range(1, 9)]
    for record, expected in zip(records, runs.records("torch-bad", "train"), strict=True):
        if record["applied"]:  # nothing of a skipped step is left in the gradients
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
            assert math.isfinite(record["grad_norm"])
        else:
            assert record["loss"] == "nan" and record["grad_norm"] in ("nan", "inf")
