"""Every engine trains alike, however the work is shared among ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from run_ranks import ROOT, made_once, python_environment, run_jobs

from megacog.training.comparison import ENGINES, TOLERANCE

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
STAGES = ("sequential", "base", "interpolation")
KEPT = ("none", "selective", "full")


def pairwise_cases(layouts: Sequence[tuple[int, int]]) -> list[str]:
    """Every engine on every layout (tensor, sequence); stages and checkpointing so that all pairs of values occur."""
    return [
        f"{engine}-{zero_stage}-{tensor}-{sequence}-{STAGES[(row + column) % 3]}-{KEPT[(row + 2 * column) % 3]}"
        for row, (tensor, sequence) in enumerate(layouts)
        for column, (engine, zero_stage) in enumerate(ENGINES)
        if zero_stage < 3 or tensor == 1
    ]


def compare_job(layouts: Sequence[tuple[int, int]], steps: int = 3) -> str:
    return f"compare:{steps},{','.join(pairwise_cases(layouts))}"


def resume_job(*cases: str) -> str:
    return f"resume:{','.join(cases)}"


ON_TWO = [(1, 1), (2, 1), (1, 2)]
ON_FOUR = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4)]
ON_EIGHT = [(8, 1), (1, 8), (4, 1), (1, 4)]
COMPARED = compare_job(ON_TWO)
SUMS = "sums:1,2,3"
POLICIES = "policies:1,2,3"
RESUMED = resume_job(
    "torch-0-1-1-bf16", "deepspeed-3-1-1-bf16", "deepspeed-1-1-2-bf16", "deepspeed-2-2-1-fp32",
    "deepspeed-1-1-1-bf16-offload", "deepspeed-2-2-1-bf16-fp8",
)  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two ranks found, by job."""
    jobs = [COMPARED, SUMS, POLICIES, RESUMED]
    folder = made_once(tmp_path_factory, "engines", lambda folder: run_jobs(jobs, 2, folder, timeout=480))
    return json.loads((folder / "result.json").read_text())


def assert_alike(results: list[Any], count: int) -> None:
    for result in results:
        assert len(result) == count
        for case, row in result.items():
            assert row["clipped"], "the comparison means little without clipping"
            assert max(row["loss"], row["grad_norm"], row["weights"]) < TOLERANCE, case


def test_two_ranks_train_like_one_for_every_engine_layout_and_stage(two_ranks: dict[str, list[Any]]) -> None:
    assert_alike(two_ranks[COMPARED], 14)


def test_fp32_sums_of_bf16_gradients_are_closer_to_the_truth_than_bf16_sums(two_ranks: dict[str, list[Any]]) -> None:
    for result in two_ranks[SUMS]:
        assert result.keys() == {"1", "2", "3"}
        for zero_stage, errors in result.items():
            assert errors["fp32"] < 1e-6, (zero_stage, errors)
            assert 1e-3 < errors["bf16"] < 2e-2, (zero_stage, errors)


def test_activation_policies_train_alike_with_every_zero_stage(two_ranks: dict[str, list[Any]]) -> None:
    for result in two_ranks[POLICIES]:
        assert result.keys() == {"1", "2", "3"}
        for zero_stage, found in result.items():
            for policy in ("selective", "full"):
                for one, other in zip(found["none"], found[policy], strict=True):
                    assert other == pytest.approx(one, rel=1e-6), (zero_stage, policy)


@pytest.mark.slow
def test_building_never_holds_more_than_the_weights_and_what_is_trained(tmp_path: Path) -> None:
    job = "building:1,3"
    for result in run_jobs([job], 2, tmp_path)[job]:
        for zero_stage, mib in result.items():
            assert mib["weights"] > 200 and mib["weights"] > 4 * mib["trained"]
            assert mib["model"] < 1.1 * mib["weights"], (zero_stage, mib)
            # ZeRO 1: fp32 gradients (twice the trained bf16 weights) and half of the masters; ZeRO 3: half of both.
            state = {"1": 3, "3": 2}[zero_stage] * mib["trained"]
            assert mib["engine"] < 1.1 * mib["weights"] + state, (zero_stage, mib)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layouts", "count"), [(4, ON_FOUR, 23), (8, ON_EIGHT, 18)])
def test_four_and_eight_ranks_train_like_one_for_every_engine_layout_and_stage(
    ranks: int, layouts: list[tuple[int, int]], count: int, tmp_path: Path
) -> None:
    job = compare_job(layouts)
    assert_alike(run_jobs([job], ranks, tmp_path, timeout=580)[job], count)


def assert_resumes_bitwise(results: list[Any], cases: list[str]) -> None:
    assert len(results) == 2
    for result in results:
        assert result == {name: {"losses": True, "states": True} for name in cases}


def test_resuming_on_two_ranks_is_bitwise(two_ranks: dict[str, list[Any]]) -> None:
    assert_resumes_bitwise(two_ranks[RESUMED], RESUMED.removeprefix("resume:").split(","))


@pytest.mark.slow
def test_resuming_on_two_ranks_is_bitwise_for_the_other_engines(tmp_path: Path) -> None:
    cases = [
        "torch-0-1-1-fp32", "deepspeed-0-1-1-fp32", "deepspeed-1-1-1-fp32", "deepspeed-2-1-1-bf16",
        "deepspeed-3-1-1-fp32", "torch-0-2-1-bf16", "deepspeed-0-2-1-fp32", "deepspeed-1-2-1-bf16",
        "deepspeed-2-2-1-bf16", "torch-0-1-2-bf16", "deepspeed-0-1-2-fp32", "deepspeed-2-1-2-bf16",
        "deepspeed-3-1-2-bf16", "deepspeed-3-1-2-fp32",
    ]  # fmt: skip
    job = resume_job(*cases)
    assert_resumes_bitwise(run_jobs([job], 2, tmp_path)[job], cases)


@pytest.mark.slow
def test_the_proof_starts_its_own_ranks_and_prints_a_line_per_engine() -> None:
    command = [sys.executable, "launch/prove.py", "engines", "--steps", "2", "--tensor", "2", "--sequence", "2"]
    result = subprocess.run(command, cwd=ROOT, env=python_environment(), capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    *rows, verdict = result.stdout.splitlines()
    assert len(rows) == 9 and sum("tensor 2 x sequence 1 x data 1" in row for row in rows) == 4
    assert sum("tensor 1 x sequence 2 x data 1" in row for row in rows) == 5
    assert verdict.startswith("all within 1e-05 of the plain engine on one rank over 2 steps")
