from __future__ import annotations

import pytest

from megacog.errors import EnvError
from megacog.runtime.ranks import Ranks, discover

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[03-04,9]",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "job-1",
}


def test_without_a_launcher_there_is_one_process_and_its_variables_are_set() -> None:
    environ: dict[str, str] = {}
    assert discover(environ) == Ranks(0, 1, 0, 1, "single process")
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert 0 < int(environ["MASTER_PORT"]) < 65536
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("0", "1", "0")


def test_discovering_twice_gives_the_same_place() -> None:
    environ: dict[str, str] = {}
    first = discover(environ)
    second = discover(environ)
    assert (first.rank, first.world_size) == (second.rank, second.world_size)


def test_torchrun_variables_are_read() -> None:
    assert discover(dict(TORCHRUN)) == Ranks(5, 8, 1, 4, "torchrun")


def test_deepspeed_names_the_local_size_differently() -> None:
    environ = {
        **{key: value for key, value in TORCHRUN.items() if key not in ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")},
        "LOCAL_SIZE": "4",
        "CROSS_RANK": "1",
        "CROSS_SIZE": "2",
    }
    assert discover(environ) == Ranks(5, 8, 1, 4, "deepspeed")
    assert environ["LOCAL_WORLD_SIZE"] == "4"


def test_a_hand_made_local_world_needs_no_local_size() -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert discover(environ).local_world_size == 2


def test_slurm_tasks_are_placed_and_meet_at_the_first_host() -> None:
    environ = dict(SLURM)
    assert discover(environ) == Ranks(3, 5, 1, 2, "slurm")
    assert environ["MASTER_ADDR"] == "gpu03"
    other = {**SLURM, "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    assert discover(other).local_world_size == 1
    assert other["MASTER_PORT"] == environ["MASTER_PORT"]


@pytest.mark.parametrize(
    ("nodelist", "host"), [("a1,b2", "a1"), ("n[7,9]", "n7"), ("n[01-20]-ib", "n01-ib"), ("single", "single")]
)
def test_the_first_host_of_a_compressed_list_is_found(nodelist: str, host: str) -> None:
    environ = {**SLURM, "SLURM_STEP_NODELIST": nodelist}
    discover(environ)
    assert environ["MASTER_ADDR"] == host


def test_a_batch_script_of_slurm_is_a_single_process() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    assert discover(batch).source == "single process"


def test_open_mpi_variables_are_read_and_ranks_agree_on_the_port() -> None:
    one, two = dict(OPENMPI), {**OPENMPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert discover(one) == Ranks(1, 2, 1, 2, "openmpi")
    discover(two)
    assert one["MASTER_PORT"] == two["MASTER_PORT"]


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "not WORLD_SIZE, LOCAL_RANK"),
        ({**TORCHRUN, "RANK": "8"}, "outside a world of 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({**TORCHRUN, "RANK": "x"}, "'x' is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "MASTER_ADDR"),
        ({"PMI_SIZE": "4"}, "PMI_"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE"),
    ],
)
def test_incomplete_and_impossible_variables_are_errors(environ: dict[str, str], message: str) -> None:
    with pytest.raises(EnvError, match=message):
        discover(dict(environ))


def test_one_exported_rank_copied_to_every_task_is_an_error() -> None:
    copied = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with pytest.raises(EnvError, match="contradict SLURM_PROCID=3"):
        discover({**SLURM, **copied})
    with pytest.raises(EnvError, match="contradict OMPI_COMM_WORLD_RANK=1"):
        discover({**OPENMPI, **copied})


def test_torchrun_under_srun_with_one_task_per_node_is_fine() -> None:
    assert discover({**TORCHRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}).rank == 5
