"""NaN and flipped bits injected on one rank of two; logs on a full disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_inputs, settings, write_config

from megacog.checkpoint.discovery import list_checkpoints
from megacog.metrics.record import read_records
from megacog.training.fault_times import run_forked_ranks
from megacog.training.guard import FOLDER

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def train(inputs: Path, folder: Path, fault: str, ranks: int = 2, **sections: Any) -> tuple[list[int], str]:
    """Exit codes and output of a run with a fault."""
    values = settings(inputs, folder / "run", "base", engine="torch", steps=8, eval_every=0)
    values["checkpoint"] = {"every": 4, "asynchronous": False}  # else it may not be whole when the run ends
    config = write_config(folder / "run.yaml", values | sections)
    codes, _, orphans = run_forked_ranks(["--config", str(config)], ranks, folder, fault)
    assert orphans == 0
    output = folder / "output"
    return codes, output.read_text() if output.is_file() else ""


def records(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(folder / "run/metrics.jsonl") if record["kind"] == "train"]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_its_samples_dumped(
    inputs: Path, tmp_path: Path, phase: str
) -> None:
    codes, output = train(inputs, tmp_path, f"rank:1,step:5,phase:{phase},kind:nan")
    assert codes == [0, 0], output
    applied = [(record["applied"], record["skipped"]) for record in records(tmp_path)]
    assert applied == [(True, 0)] * 4 + [(False, 1)] + [(True, 1)] * 3
    dumped = sorted(path.name for path in (tmp_path / "run" / FOLDER).iterdir())
    # Where only gradients are not finite, nobody knows whose samples did it.
    expected = [1] if phase == "forward" else [0, 1]
    assert dumped == [f"step-0000005-rank-{rank}.json" for rank in expected]
    found = json.loads((tmp_path / "run" / FOLDER / dumped[-1]).read_text())
    assert found["rank"] == 1 and found["micro_batches"][0]["sample_ids"]


def test_steps_that_stay_bad_end_the_run_on_all_ranks_after_the_limit(inputs: Path, tmp_path: Path) -> None:
    codes, output = train(inputs, tmp_path, "rank:1,phase:forward,kind:nan", watch={"max_skipped_steps": 3})
    assert codes == [1, 1] and output.count("3 steps in a row were not finite") == 2, output
    assert len(list((tmp_path / "run" / FOLDER).iterdir())) == 3


def test_a_flipped_bit_is_found_and_no_checkpoint_is_made_of_it(inputs: Path, tmp_path: Path) -> None:
    codes, output = train(
        inputs, tmp_path, "rank:2,step:5,phase:step,kind:flip", ranks=3,
        train={**settings(inputs, tmp_path / "run", "base", engine="torch", steps=8, eval_every=0)["train"],
               "global_batch_size": 6},
        watch={"compare_weights_every": 3},
    )  # fmt: skip
    assert codes == [1, 1, 1], output
    message = "step 6: weights that all data-parallel ranks must hold alike differ on rank 2 on "
    assert output.count(message) == 3 and "code_embedding.weight" in output, output
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-0000004"]


@pytest.mark.parametrize(
    ("ranks", "message"), [("", "step 8: trained weights are not finite: "), ("rank:1,", "step 8: weights that all ")]
)
def test_no_checkpoint_is_made_of_weights_that_are_not_finite_and_the_one_before_is_resumed(
    inputs: Path, tmp_path: Path, ranks: str, message: str
) -> None:
    codes, output = train(inputs, tmp_path, f"{ranks}step:7,phase:step,kind:nan")
    assert codes == [1, 1] and output.count(message) == 2, output
    assert [record["applied"] for record in records(tmp_path)] == [True] * 7 + [False], "noticed in the next step"
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-0000004"]
    codes, output = train(inputs, tmp_path, "")
    assert codes == [0, 0] and "resumed at step 4" in output, output
    assert [record["applied"] for record in records(tmp_path)] == [True] * 8


def test_a_log_on_a_full_disk_stops_nothing(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "output").symlink_to("/dev/full")
    codes, _ = train(inputs, tmp_path, "")
    assert codes == [0, 0]
    assert (tmp_path / "run/export/manifest.json").is_file() and len(records(tmp_path)) == 8
