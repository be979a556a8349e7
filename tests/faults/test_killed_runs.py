"""Twenty random kills: every run ends bit for bit as if nobody had killed it. `launch/soak.py kills` does thousands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_ranks import ROOT, python_environment

from megacog.training.soak_record import SoakRecord
from megacog.training.soak_trials import count_kills, failures

KILLS = 20

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def soak(record: Path, kills: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/soak.py", "kills", "--record", str(record), "--kills", str(kills)]
    command += ["--seed", "20261122", "--cold-every", "0"]
    return subprocess.run(command, cwd=ROOT, env=python_environment(), capture_output=True, text=True, timeout=700)


def test_randomly_killed_runs_end_as_if_nobody_had_killed_them(tmp_path: Path, figure: Callable[[str], None]) -> None:
    result = soak(tmp_path / "kills.jsonl", KILLS)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = list(SoakRecord(tmp_path / "kills.jsonl", "kills").lines())
    kills = [kill for line in lines if line["event"] == "trial" for kill in line["kills"]]
    assert count_kills(lines) == len(kills) >= KILLS and not failures(lines)
    assert {"all"} < {kill["whom"] for kill in kills}, "also single ranks"
    assert any(kill["phase"] == "save" for kill in kills), "also inside of saves"
    assert any(kill["lost"] > 0 for kill in kills), "a soak in which no work is ever lost kills nothing"
    for line in result.stdout.splitlines()[-8:]:
        figure(f"kills: {line}")
    again = soak(tmp_path / "kills.jsonl", KILLS)  # nothing is left to do
    assert again.returncode == 0 and again.stdout.splitlines()[0] in result.stdout
