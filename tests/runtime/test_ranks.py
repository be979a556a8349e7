from __future__ import annotations

import pytest

from megacog.config.cluster import ClusterConfig
from megacog.errors import ConfigError, EnvError
from megacog.runtime.ranks import Ranks, discover, gpu_index, ranks_by_host, require_world

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
    assert 20000 <= int(environ["MASTER_PORT"]) < 32000, "nothing that asks Linux for any port gets it meanwhile"
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


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("gpu[03-04,9]", ["gpu03", "gpu04", "gpu9"]),
        ("a1,b[2-3],c", ["a1", "b2", "b3", "c"]),
        ("rack[1-2]n[09-10]-ib", ["rack1n09-ib", "rack1n10-ib", "rack2n09-ib", "rack2n10-ib"]),
    ],
)
def test_srun_says_how_many_ranks_each_host_has(nodelist: str, hosts: list[str]) -> None:
    environ = {**SLURM, "SLURM_STEP_NODELIST": nodelist, "SLURM_STEP_TASKS_PER_NODE": f"2(x{len(hosts)})"}
    assert ranks_by_host(discover(dict(environ)), environ) == dict.fromkeys(hosts, 2)
    assert ranks_by_host(discover(dict(SLURM)), SLURM) == {"gpu03": 2, "gpu04": 2, "gpu9": 1}
    assert ranks_by_host(discover(dict(TORCHRUN)), SLURM) == {}


@pytest.mark.parametrize("nodelist", ["n[1-", "n[a-b]", "n 1", "n]1["])
def test_a_list_of_hosts_that_cannot_be_read_is_told(nodelist: str) -> None:
    with pytest.raises(EnvError, match="cannot read the hosts of"):
        discover({**SLURM, "SLURM_STEP_NODELIST": nodelist})


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


def test_mpirun_inside_a_slurm_job_counts_its_own_ranks() -> None:
    # Its tasks inherit the variables of the step in which srun started one helper of mpirun per node.
    inherited = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NODELIST": "gpu[03-04]"}
    two_hosts = {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    environ = {**two_hosts, **inherited}
    assert discover(environ) == Ranks(1, 2, 0, 1, "openmpi")
    assert environ["MASTER_ADDR"] == "gpu03"


def test_one_line_says_what_was_found_and_where_the_ranks_meet() -> None:
    line = str(discover(dict(SLURM)))
    assert line.startswith("rank 3 of 5, local rank 1 of 2 on ") and "\n" not in line
    assert "from srun (SLURM_PROCID" in line and "meet at gpu03:" in line
    assert line.endswith("(host from the nodes gpu[03-04,9], port from job step 77.0)")
    assert "(host from MASTER_ADDR, port from job step" in str(discover({**SLURM, "MASTER_ADDR": "head"}))
    assert str(discover(dict(TORCHRUN))).endswith("at node1:29500 (host from MASTER_ADDR, port from MASTER_PORT)")
    assert "from no launcher" in str(discover({}))


def world(cluster: ClusterConfig, size: int, local: int, source: str = "slurm") -> str:
    with pytest.raises(ConfigError) as info:
        require_world(Ranks(0, size, 0, local, source), cluster)
    return str(info.value)


def test_ranks_must_be_those_that_the_configuration_asks_for() -> None:
    require_world(Ranks(0, 3, 0, 3, "slurm"), ClusterConfig())
    cluster = ClusterConfig(nodes=13, gpus_per_node=8)
    require_world(Ranks(0, 104, 0, 8, "slurm"), cluster)
    message = world(cluster, 96, 8)
    assert "asks for 104 ranks (cluster.nodes 13 x 8 on each), but there are 96, 8 of them on " in message
    assert "srun --nodes=13 --ntasks-per-node=8" in message and message.endswith("or set cluster.nodes=12")
    assert "give deepspeed a --hostfile that exists" in world(cluster, 8, 8, "deepspeed")
    assert "cluster.nodes=" not in world(ClusterConfig(nodes=2), 2, 2, "openmpi")  # both on one machine
    assert "start it with srun" in world(ClusterConfig(nodes=2), 1, 1, "single process")


def test_every_rank_has_a_gpu_of_its_own() -> None:
    assert gpu_index(Ranks(9, 16, 1, 8, "slurm"), visible=8) == 1
    assert gpu_index(Ranks(9, 16, 1, 8, "slurm"), visible=1) == 0  # as --gpus-per-task shows it
    with pytest.raises(EnvError, match="local rank 5 of 8 on .* sees 4 GPUs: .*gpus_per_node=4"):
        gpu_index(Ranks(5, 16, 5, 8, "slurm"), visible=4)
