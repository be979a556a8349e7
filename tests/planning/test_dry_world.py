"""A world of ranks without machines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from run_ranks import ROOT, python_environment

from megacog.training.dry_world import RankReport, _coverage

RUN = {
    "model": {
        "num_layers": 6, "hidden_size": 64, "num_heads": 4, "grid": [4, 4], "text_length": 8, "text_positions": 8,
        "image_vocab_size": 50, "text_vocab_size": 40, "boi_id": 3, "inherit": "none",
    },
    "tokenizer": {"text": "none", "frames": "none"},
    "train": {
        "stage": "sequential", "run_dir": "none", "steps": 10, "global_batch_size": 16, "micro_batch_size": 2,
    },
    "deepspeed": {"zero_optimization": {"reduce_bucket_size": 10000}},
}  # fmt: skip


@pytest.mark.parametrize(("zero", "base"), [(1, "null"), (2, "null"), (2, "fp8")])
def test_a_small_world_covers_every_parameter_and_is_as_large_as_planned(tmp_path: Path, zero: int, base: str) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    command = ["launch/prove.py", "world", "--config", str(tmp_path / "run.yaml"), "--nodes", "2", "--gpus", "2"]
    done = subprocess.run(
        [sys.executable, *command, "--steps", "3", f"train.zero_stage={zero}", f"train.base_precision={base}"],
        cwd=ROOT, env=python_environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 ranks: fragments of 31 trained parameters" in done.stdout
    assert done.stdout.count("held") == 4 and done.stdout.count("peak") == 1


def reports(*fragments: tuple[int, int] | None) -> list[RankReport]:
    return [RankReport(rank, {} if part is None else {"w": part}, {"w": 100}, 0) for rank, part in enumerate(fragments)]


def test_every_element_has_one_owner() -> None:
    assert list(_coverage(reports((0, 40), None, (40, 60)), 1)) == []
    assert list(_coverage(reports((0, 40), (50, 50)), 1)) == ["w: elements 40 to 50 have no owner"]
    assert list(_coverage(reports((0, 40), (30, 70)), 1)) == ["w: elements 30 to 40 have two owners"]
    assert list(_coverage(reports((0, 40), (40, 50)), 1)) == ["w: 90 of 100 elements have an owner"]


def test_tensor_parallel_places_are_covered_each() -> None:
    assert list(_coverage(reports((0, 50), (0, 60), (50, 50), (60, 40)), 2)) == []
    assert list(_coverage(reports((0, 50), (0, 60), (50, 50), None), 2)) == ["w: 60 of 100 elements have an owner"]
