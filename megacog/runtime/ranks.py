"""Who am I among the processes of this run?

The same script runs under `deepspeed`, `torchrun`, `srun`, `mpirun` and plain `python`. Whatever the
launcher, the variables that torch.distributed and DeepSpeed read are set afterwards; without them
DeepSpeed would try MPI, also on a laptop that has none.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass

from megacog.errors import EnvError

_FIRST_PORT = 20000
_NUM_PORTS = 20000


@dataclass(frozen=True)
class Ranks:
    """Place of this process in the run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    source: str
    """Where it was found: "deepspeed", "torchrun", "environment", "slurm", "openmpi" or "single process"."""


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
    elif "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        ranks = _from_slurm(environ)
    elif "OMPI_COMM_WORLD_SIZE" in environ:
        ranks = _from_openmpi(environ)
    elif int(environ.get("PMI_SIZE", "1")) > 1:
        raise EnvError(
            "started by an MPI launcher that sets only PMI_* variables, which megacog does not read. "
            "Use srun, Open MPI's mpirun, torchrun or deepspeed, or export RANK, WORLD_SIZE and LOCAL_RANK."
        )
    else:
        ranks = Ranks(0, 1, 0, 1, "single process")
        environ.setdefault("MASTER_ADDR", "127.0.0.1")
        environ.setdefault("MASTER_PORT", str(_free_port()))
    _check_range(ranks)
    environ["RANK"] = str(ranks.rank)
    environ["WORLD_SIZE"] = str(ranks.world_size)
    environ["LOCAL_RANK"] = str(ranks.local_rank)
    environ["LOCAL_WORLD_SIZE"] = str(ranks.local_world_size)
    return ranks


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
    if world_size == 1:
        environ.setdefault("MASTER_ADDR", "127.0.0.1")
        environ.setdefault("MASTER_PORT", str(_free_port()))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environ:
            raise EnvError(
                f"RANK={rank} of WORLD_SIZE={world_size} but {name} is not set: ranks cannot meet. Export it."
            )
    local_size_name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), None)
    if local_size_name is not None:
        local_world_size = _integer(environ, local_size_name)
    else:
        on_this_host = environ["MASTER_ADDR"] in ("127.0.0.1", "localhost", "::1")
        local_world_size = world_size if on_this_host else local_rank + 1
    return Ranks(rank, world_size, local_rank, local_world_size, source)


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
    if "MASTER_ADDR" not in environ:
        hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "127.0.0.1")
        environ["MASTER_ADDR"] = "127.0.0.1" if len(counts) == 1 else _first_host(hosts)
    if "MASTER_PORT" not in environ:
        # Every task must arrive at the same port without talking to the others.
        name = f"{environ.get('SLURM_JOB_ID', '0')}.{environ.get('SLURM_STEP_ID', '0')}"
        environ["MASTER_PORT"] = str(_port_for(name))
    return Ranks(rank, world_size, local_rank, counts[node], "slurm")


def _from_openmpi(environ: MutableMapping[str, str]) -> Ranks:
    rank, world_size = _integer(environ, "OMPI_COMM_WORLD_RANK"), _integer(environ, "OMPI_COMM_WORLD_SIZE")
    local_rank = _integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
    local_world_size = _integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if "MASTER_ADDR" not in environ:
        if local_world_size != world_size:
            raise EnvError(
                "mpirun on several hosts without MASTER_ADDR: ranks cannot meet. "
                "Start with `mpirun -x MASTER_ADDR=<first host> -x MASTER_PORT=29500 ...`."
            )
        environ["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in environ:
        environ["MASTER_PORT"] = str(_port_for(environ.get("PMIX_NAMESPACE", f"parent {os.getppid()}")))
    return Ranks(rank, world_size, local_rank, local_world_size, "openmpi")


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


def _first_host(nodelist: str) -> str:
    """Return the first host of SLURM's compressed list: "gpu[03-05,9],cpu1" gives "gpu03"."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise EnvError(f"cannot read the first host of {nodelist!r}; export MASTER_ADDR")
    return match[1] + (match[2] or "") + (match[3] or "")


def _port_for(name: str) -> int:
    return _FIRST_PORT + zlib.crc32(name.encode()) % _NUM_PORTS


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
