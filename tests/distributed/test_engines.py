"""Every engine trains alike, however many ranks share the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_ranks import run_ranks

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5


def run_job(job: str, world_size: int, folder: Path, *arguments: str, timeout: float = 240) -> list[Any]:
    """Results of a job of rank_jobs.py, in rank order."""
    run_ranks(["tests/rank_jobs.py", job, str(folder), *arguments], world_size, folder, timeout).assert_success()
    return json.loads((folder / "result.json").read_text())


def assert_alike(results: list[Any], tensor_sizes: list[int]) -> None:
    for result in results:
        assert [row["tensor"] for row in result["rows"]] == [size for size in tensor_sizes for _ in range(5)]
        for row in result["rows"]:
            assert row["clipped"], "the comparison means little without clipping"
            assert row["loss"] < TOLERANCE and row["grad_norm"] < TOLERANCE, row


def test_two_ranks_train_like_one_for_every_engine_and_zero_stage(tmp_path: Path) -> None:
    assert_alike(run_job("compare", 2, tmp_path, "20", "1", "2"), [1, 2])


@pytest.mark.slow
def test_four_ranks_train_like_one_for_every_engine_and_zero_stage(tmp_path: Path) -> None:
    assert_alike(run_job("compare", 4, tmp_path, "20", "1", "2", "4", timeout=290), [1, 2, 4])


def assert_resumes_bitwise(tensor: str, engines: list[str], folder: Path) -> None:
    for result in run_job("resume", 2, folder, tensor, *engines):
        assert result == {name: {"losses": True, "states": True} for name in engines}


def test_resuming_on_two_ranks_is_bitwise(tmp_path: Path) -> None:
    engines = ["torch-0-bf16", "deepspeed-1-bf16", "deepspeed-2-fp32", "deepspeed-3-bf16"]
    assert_resumes_bitwise("1", engines, tmp_path)


@pytest.mark.slow
def test_resuming_on_two_ranks_is_bitwise_for_the_other_engines(tmp_path: Path) -> None:
    engines = ["torch-0-fp32", "deepspeed-0-fp32", "deepspeed-1-fp32", "deepspeed-2-bf16", "deepspeed-3-fp32"]
    assert_resumes_bitwise("1", engines, tmp_path)


@pytest.mark.slow
def test_resuming_with_tensor_parallelism_is_bitwise_for_every_engine(tmp_path: Path) -> None:
    engines = ["torch-0-bf16", "deepspeed-0-fp32"] + [f"deepspeed-{zero_stage}-bf16" for zero_stage in (1, 2, 3)]
    assert_resumes_bitwise("2", engines, tmp_path)
