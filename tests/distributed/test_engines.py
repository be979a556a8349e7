"""Every engine trains alike, however many ranks share the work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_ranks import ROOT, made_once, python_environment, run_jobs

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
TOLERANCE = 1e-5
COMPARED = "compare:sequential,20,1,2"
ALL_TRAINED = "compare:base,3,1,2"
SUMS = "sums:1,2,3"
RESUMED = "resume:1,torch-0-bf16,deepspeed-1-bf16,deepspeed-2-fp32,deepspeed-3-bf16,deepspeed-1-bf16-offload"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two ranks found, by job."""
    jobs = [COMPARED, ALL_TRAINED, SUMS, RESUMED]
    folder = made_once(tmp_path_factory, "engines", lambda folder: run_jobs(jobs, 2, folder, timeout=480))
    return json.loads((folder / "result.json").read_text())


def assert_alike(results: list[Any], tensor_sizes: list[int]) -> None:
    for result in results:
        assert [row["tensor"] for row in result["rows"]] == [size for size in tensor_sizes for _ in range(5)]
        for row in result["rows"]:
            assert row["clipped"], "the comparison means little without clipping"
            assert row["loss"] < TOLERANCE and row["grad_norm"] < TOLERANCE, row


def test_two_ranks_train_like_one_for_every_engine_and_zero_stage(two_ranks: dict[str, list[Any]]) -> None:
    assert_alike(two_ranks[COMPARED], [1, 2])


def test_two_ranks_train_the_base_like_one_where_embeddings_norms_and_head_are_trained(
    two_ranks: dict[str, list[Any]],
) -> None:
    assert_alike(two_ranks[ALL_TRAINED], [1, 2])


def test_fp32_sums_of_bf16_gradients_are_closer_to_the_truth_than_bf16_sums(two_ranks: dict[str, list[Any]]) -> None:
    for result in two_ranks[SUMS]:
        assert result.keys() == {"1", "2", "3"}
        for zero_stage, errors in result.items():
            assert errors["fp32"] < 0.75 * errors["bf16"], (zero_stage, errors)  # ranks exchange bf16 either way
            assert errors["bf16"] < 0.02, (zero_stage, errors)


@pytest.mark.slow
def test_four_ranks_train_like_one_for_every_engine_and_zero_stage(tmp_path: Path) -> None:
    job = "compare:sequential,20,1,2,4"
    assert_alike(run_jobs([job], 4, tmp_path, timeout=290)[job], [1, 2, 4])


def assert_resumes_bitwise(results: list[Any], engines: list[str]) -> None:
    assert len(results) == 2
    for result in results:
        assert result == {name: {"losses": True, "states": True} for name in engines}


def test_resuming_on_two_ranks_is_bitwise(two_ranks: dict[str, list[Any]]) -> None:
    assert_resumes_bitwise(two_ranks[RESUMED], RESUMED.split(",")[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "engines"),
    [
        (1, ["torch-0-fp32", "deepspeed-0-fp32", "deepspeed-1-fp32", "deepspeed-2-bf16", "deepspeed-3-fp32"]),
        (2, ["torch-0-bf16", "deepspeed-0-fp32", "deepspeed-1-bf16", "deepspeed-2-bf16", "deepspeed-3-bf16"]),
    ],
)
def test_resuming_on_two_ranks_is_bitwise_for_the_other_engines(
    tmp_path: Path, tensor: int, engines: list[str]
) -> None:
    job = f"resume:{tensor},{','.join(engines)}"
    assert_resumes_bitwise(run_jobs([job], 2, tmp_path)[job], engines)


@pytest.mark.slow
def test_the_proof_starts_its_own_ranks_and_prints_a_line_per_engine() -> None:
    command = [sys.executable, "launch/prove.py", "engines", "--steps", "2", "--tensor", "2"]
    result = subprocess.run(command, cwd=ROOT, env=python_environment(), capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    *rows, verdict = result.stdout.splitlines()
    assert len(rows) == 5 and all("tensor 2 x data 1, 2 steps" in row for row in rows)
    assert verdict == "all within 1e-05 of the plain engine on one rank"
