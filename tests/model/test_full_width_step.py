"""A real training step at the release's width, on a CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from full_width_step import SHAPE, THREADS
from run_ranks import ROOT, python_environment


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_layers_of_full_width_train_in_bf16_within_10_gib_and_60_s_alike_with_every_policy() -> None:
    command = [sys.executable, "tests/full_width_step.py", "none", "selective", "full"]
    environment = python_environment() | {"OMP_NUM_THREADS": str(THREADS)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stderr
    none, selective, full = (json.loads(line) for line in result.stdout.splitlines())
    assert none["peak_gib"] <= 10 and full["peak_gib"] <= 10
    # Seconds of work: others may be computing on the same cores.
    assert min(none["seconds"], none["cpu_seconds"] / THREADS) <= 60, none
    assert abs(none["loss"] - math.log(SHAPE["image_vocab_size"])) < 2 and none["grad_norm"] > 0  # type: ignore[arg-type]
    for other in (selective, full):
        assert other["loss"] == none["loss"]
        assert other["grad_norm"] == pytest.approx(none["grad_norm"], rel=1e-3)
