"""Who am I among the processes of this run?

The same script runs under `deepspeed`, `torchrun`, `srun`, `mpirun` and plain `python`. Whatever the
launcher, the variables that torch.distributed and DeepSpeed read are set afterwards; without them
DeepSpeed would try MPI, also on a laptop that has none.
"""

from __future__ import annotations

import os
import random
import re
import socket
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from megacog.config.cluster import ClusterConfig
from megacog.errors import ConfigError, EnvError

# Below the ports that Linux hands out by itself (from 32768 on).
_FIRST_PORT = 20000
_NUM_PORTS = 12000


@dataclass(frozen=True)
class Ranks:
    """Place of this process in the run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    source: str
    """Where it was found: "deepspeed", "torchrun", "environment", "slurm", "openmpi" or "single process"."""
    meeting: str = field(default="", compare=False)
    """Where the ranks meet and how that was found, for people."""

    def __str__(self) -> str:
        return (
            f"rank {self.rank} of {self.world_size}, local rank {self.local_rank} of {self.local_world_size} on "
            f"{socket.gethostname()}, from {_VARIABLES[self.source]}; ranks meet at {self.meeting}"
        )


_VARIABLES = {
    "deepspeed": "DeepSpeed's launcher (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE)",
    "torchrun": "torchrun (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE)",
    "environment": "the environment (RANK, WORLD_SIZE, LOCAL_RANK)",
    "slurm": "srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID)",
    "openmpi": "Open MPI's mpirun (OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK)",
    "single process": "no launcher",
}


def discover(environ: MutableMapping[str, str] | None = None) -> Ranks:
    """Return the place of this process and set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR
    and MASTER_PORT in the environment where they are missing.

    Args:
        environ: the environment to read and complete; os.environ if None.

    Raises:
        EnvError: the variables are incomplete or contradict each other.
    """
    environ = os.environ if environ is None else environ
    if "RANK" in environ or "WORLD_SIZE" in environ:
        ranks = _from_torch_variables(environ)
    elif "OMPI_COMM_WORLD_SIZE" in environ:  # before SLURM: inside a job, srun starts mpirun's own helpers
        ranks = _from_openmpi(environ)
    elif "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        ranks = _from_slurm(environ)
    elif int(environ.get("PMI_SIZE", "1")) > 1:
        raise EnvError(
            "started by an MPI launcher that sets only PMI_* variables, which megacog does not read. "
            "Use srun, Open MPI's mpirun, torchrun or deepspeed, or export RANK, WORLD_SIZE and LOCAL_RANK."
        )
    else:
        meeting = _meet(environ, "127.0.0.1", "this machine", free_port(), "the free ones")
        ranks = Ranks(0, 1, 0, 1, "single process", meeting)
    _check_range(ranks)
    environ["RANK"] = str(ranks.rank)
    environ["WORLD_SIZE"] = str(ranks.world_size)
    environ["LOCAL_RANK"] = str(ranks.local_rank)
    environ["LOCAL_WORLD_SIZE"] = str(ranks.local_world_size)
    return ranks


def ranks_by_host(ranks: Ranks, environ: Mapping[str, str]) -> dict[str, int]:
    """How many ranks each host should have; empty where the launcher does not say (all but srun)."""
    if ranks.source != "slurm" or "SLURM_STEP_NODELIST" not in environ:
        return {}
    counts = _expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", str(ranks.world_size)))
    return dict(zip(_expand_hosts(environ["SLURM_STEP_NODELIST"]), counts, strict=True))


def require_world(ranks: Ranks, cluster: ClusterConfig) -> None:
    """Refuse to start on other ranks than the configuration asks for, if it does.

    Raises:
        ConfigError: there are more or fewer ranks, or they lie otherwise on the machines.
    """
    if cluster.nodes is None:
        return
    local = cluster.local_ranks
    if (ranks.world_size, ranks.local_world_size) == (cluster.nodes * local, local):
        return
    nodes, rest = divmod(ranks.world_size, local)
    if ranks.source == "deepspeed" and ranks.world_size < cluster.nodes * local:
        hint = "give deepspeed a --hostfile that exists (it trains on this machine alone when it finds none)"
    elif ranks.source == "single process":
        hint = "start it with srun, deepspeed, torchrun or mpirun"
    elif ranks.source == "slurm":
        hint = f"start it with `srun --nodes={cluster.nodes} --ntasks-per-node={local}`"
    else:
        hint = "start as many on every machine"
    instead = f", or set cluster.nodes={nodes}" if nodes and not rest and ranks.local_world_size == local else ""
    raise ConfigError(
        f"the configuration asks for {cluster.nodes * local} ranks (cluster.nodes {cluster.nodes} x {local} on each), "
        f"but there are {ranks.world_size}, {ranks.local_world_size} of them on {socket.gethostname()}, as found from "
        f"{_VARIABLES[ranks.source]}: {hint}{instead}"
    )


def gpu_index(ranks: Ranks, visible: int) -> int:
    """The GPU of this rank among the `visible` ones.

    Raises:
        EnvError: There are fewer GPUs than ranks on this machine.
    """
    if ranks.local_rank < visible:
        return ranks.local_rank
    if visible == 1 and ranks.source == "slurm":  # --gpus-per-task and --gpu-bind show a task its own GPU only
        return 0
    raise EnvError(
        f"local rank {ranks.local_rank} of {ranks.local_world_size} on {socket.gethostname()} sees {visible} GPUs: "
        f"start one rank per GPU (cluster.gpus_per_node={visible}), or look at CUDA_VISIBLE_DEVICES and nvidia-smi"
    )


def _meet(environ: MutableMapping[str, str], address: str, address_from: str, port: int, port_from: str) -> str:
    """Say where the ranks meet, which the environment may have decided already, and how that was found."""
    if "MASTER_ADDR" in environ:
        address_from = "MASTER_ADDR"
    if "MASTER_PORT" in environ:
        port_from = "MASTER_PORT"
    address = environ.setdefault("MASTER_ADDR", address)
    return f"{address}:{environ.setdefault('MASTER_PORT', str(port))} (host from {address_from}, port from {port_from})"


def _from_torch_variables(environ: MutableMapping[str, str]) -> Ranks:
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in environ]
    if missing:
        raise EnvError(
            f"the environment has some rank variables but not {', '.join(missing)}. "
            "Start with deepspeed, torchrun or srun, or unset RANK, WORLD_SIZE, LOCAL_RANK for one process."
        )
    rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    local_rank = _integer(environ, "LOCAL_RANK")
    source = "environment"
    if "TORCHELASTIC_RUN_ID" in environ:
        source = "torchrun"
    elif "CROSS_SIZE" in environ:
        source = "deepspeed"
    _check_against_scheduler(environ, rank, world_size, started_by_launcher=source != "environment")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environ and world_size > 1:
            raise EnvError(
                f"RANK={rank} of WORLD_SIZE={world_size} but {name} is not set: ranks cannot meet. Export it."
            )
    meeting = _meet(environ, "127.0.0.1", "this machine", free_port(), "the free ones")
    local_size_name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), None)
    if local_size_name is not None:
        local_world_size = _integer(environ, local_size_name)
    else:
        on_this_host = environ["MASTER_ADDR"] in ("127.0.0.1", "localhost", "::1")
        local_world_size = world_size if on_this_host else local_rank + 1
    return Ranks(rank, world_size, local_rank, local_world_size, source, meeting)


def _check_against_scheduler(
    environ: MutableMapping[str, str], rank: int, world_size: int, started_by_launcher: bool
) -> None:
    """Refuse RANK variables that were exported once and then copied to every task of srun or mpirun."""
    for rank_name, size_name in (
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ):
        if rank_name not in environ or size_name not in environ:
            continue
        task, tasks = _integer(environ, rank_name), _integer(environ, size_name)
        contradicts = world_size < tasks or (
            not started_by_launcher and world_size == tasks and rank != task
        )
        if tasks > 1 and contradicts:
            raise EnvError(
                f"RANK={rank} WORLD_SIZE={world_size} contradict {rank_name}={task} {size_name}={tasks}. "
                "Unset RANK and WORLD_SIZE so that the scheduler's values count."
            )


def _from_slurm(environ: MutableMapping[str, str]) -> Ranks:
    rank, world_size = _integer(environ, "SLURM_PROCID"), _integer(environ, "SLURM_STEP_NUM_TASKS")
    local_rank = _integer(environ, "SLURM_LOCALID")
    node = int(environ.get("SLURM_NODEID", "0"))
    counts = _expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
    if node >= len(counts):
        raise EnvError(f"SLURM_NODEID={node} is outside SLURM_STEP_TASKS_PER_NODE={counts}")
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "127.0.0.1")
    address = "127.0.0.1" if len(counts) == 1 else _expand_hosts(hosts)[0]
    # Every task must arrive at the same port without talking to the others.
    step = f"{environ.get('SLURM_JOB_ID', '0')}.{environ.get('SLURM_STEP_ID', '0')}"
    meeting = _meet(environ, address, f"the nodes {hosts}", _port_for(step), f"job step {step}")
    return Ranks(rank, world_size, local_rank, counts[node], "slurm", meeting)


def _from_openmpi(environ: MutableMapping[str, str]) -> Ranks:
    rank, world_size = _integer(environ, "OMPI_COMM_WORLD_RANK"), _integer(environ, "OMPI_COMM_WORLD_SIZE")
    local_rank = _integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
    local_world_size = _integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    address, why = "127.0.0.1", "this machine"
    if local_world_size != world_size and "MASTER_ADDR" not in environ:
        if "SLURM_JOB_NODELIST" not in environ:
            raise EnvError(
                "mpirun on several hosts without MASTER_ADDR: ranks cannot meet. "
                "Start with `mpirun -x MASTER_ADDR=<first host> -x MASTER_PORT=29500 ...`."
            )
        address, why = _expand_hosts(environ["SLURM_JOB_NODELIST"])[0], "SLURM_JOB_NODELIST"
    name = environ.get("PMIX_NAMESPACE", f"parent {os.getppid()}")
    meeting = _meet(environ, address, why, _port_for(name), name)
    return Ranks(rank, world_size, local_rank, local_world_size, "openmpi", meeting)


@contextmanager
def meeting() -> Iterator[None]:
    """Context in which ranks meet (`init_process_group`): what goes wrong there is told with the place.

    Raises:
        EnvError: the port is in use, or the other ranks do not come.
    """
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason:
            raise EnvError(
                f"{place} is in use: another run on this host has the port. Wait for its end, or export another "
                "MASTER_PORT on all ranks."
            ) from error
        raise EnvError(f"the ranks did not meet at {place}: {reason}") from error


def _check_range(ranks: Ranks) -> None:
    if not 0 <= ranks.rank < ranks.world_size:
        raise EnvError(f"rank {ranks.rank} is outside a world of {ranks.world_size} ({ranks.source})")
    if not 0 <= ranks.local_rank < ranks.local_world_size <= ranks.world_size:
        raise EnvError(
            f"local rank {ranks.local_rank} of {ranks.local_world_size} does not fit "
            f"rank {ranks.rank} of {ranks.world_size} ({ranks.source})"
        )


def _integer(environ: MutableMapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except KeyError:
        raise EnvError(f"{name} is not set although this process was started as one of several") from None
    except ValueError:
        raise EnvError(f"{name}={environ[name]!r} is not a whole number") from None


def _expand_counts(text: str) -> list[int]:
    """Return tasks per node from SLURM's run-length form: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise EnvError(f"cannot read SLURM_STEP_TASKS_PER_NODE={text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _expand_hosts(nodelist: str) -> list[str]:
    """Return the hosts of SLURM's compressed list: "gpu[03-04,9],cpu1" is gpu03, gpu04, gpu9, cpu1."""
    if not re.fullmatch(r"(?:[^\[\]\s]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+", nodelist):
        raise EnvError(f"cannot read the hosts of {nodelist!r}; export MASTER_ADDR")
    hosts = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        names = [""]
        for text, numbers in re.findall(r"([^\[\]]+)|\[([^\]]+)\]", part):
            names = [name + piece for name in names for piece in (_expand_numbers(numbers) if numbers else [text])]
        hosts += names
    return hosts


def _expand_numbers(text: str) -> list[str]:
    """Return the numbers of "03-05,9", as wide as they are written."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return found


def _port_for(name: str) -> int:
    return _FIRST_PORT + zlib.crc32(name.encode()) % _NUM_PORTS


def free_port() -> int:
    """A port where ranks of this machine can meet, below those that Linux hands out by itself: it stays free.

    Raises:
        EnvError: None was found.
    """
    for port in random.Random().sample(range(_FIRST_PORT, _FIRST_PORT + _NUM_PORTS), 100):  # training seeds the other
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port
    raise EnvError("no free port was found for the ranks to meet: export MASTER_PORT")
