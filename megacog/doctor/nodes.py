"""Checks that need torch: this process's device, and all nodes of a job together."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megacog.doctor.check import Check, Nodes
from megacog.doctor.devices import DeviceSpeed, device_checks, lagging_checks, measure_device
from megacog.doctor.machine import gpu_checks
from megacog.doctor.network import missing_ranks, node_checks, node_rates, pair_checks, pair_rates
from megacog.errors import EnvError
from megacog.runtime.hardware import available_cores, describe_device, rank_device
from megacog.runtime.ranks import Ranks


def device_and_job_checks(node: str, own: list[Check], answer: str | None, ranks: Ranks, seconds: float) -> Nodes:
    """The checks of this process with those of its device, and under several ranks those of all nodes.

    Args:
        node: Name of this machine.
        own: What is known of it already.
        answer: What nvidia-smi says.
        ranks: Place of this process in the job.
        seconds: To wait for the other ranks.
    """
    torch.set_num_threads(max(1, available_cores() // ranks.local_world_size))
    device = rank_device(ranks)
    if ranks.local_rank == 0:
        own = [*own, libraries_check(), *gpu_checks(answer, torch.cuda.device_count())]
    speed = measure_device(device)
    own = [*own, *device_checks(speed, f"GPU {device.index}" if device.type == "cuda" else "CPU")]
    if ranks.world_size == 1:
        return {node: own}
    return check_all(node, own, speed, device, ranks, seconds)


def libraries_check() -> Check:
    """What torch was built with, for the record."""
    value = describe_device()
    if torch.version.cuda:
        value += f", CUDA {torch.version.cuda}"
    if torch.cuda.is_available() and dist.is_nccl_available():
        value += ", NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    return Check("device", "ok", value)


def check_all(
    node: str, own: list[Check], speed: DeviceSpeed, device: torch.device, ranks: Ranks, seconds: float
) -> Nodes:
    """The checks of all nodes with those between them; on rank 0 and on all others alike.

    Raises:
        EnvError: Rank 0 cannot be reached.
    """
    try:
        store = connect(ranks, seconds)
        missing = missing_ranks(store, ranks.rank, ranks.world_size, node, seconds)
    except RuntimeError as error:  # what torch.distributed raises
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise EnvError(
            f"rank {ranks.rank} on {node} cannot reach rank 0 at {place} ({str(error).strip().splitlines()[0]}); "
            "see whether rank 0 runs, and check firewall and network interface"
        ) from None
    if missing:
        value = f"{ranks.world_size - len(missing)} of {ranks.world_size} after {seconds:.0f} s; missing: {missing}"
        fix = "see the log of these ranks: their node does not start them, or cannot reach rank 0"
        return {node: [*own, Check("ranks", "sick", value, fix)]}
    limit = timedelta(seconds=2 * seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=limit)
    try:
        return _together(node, own, speed, device)
    except RuntimeError as error:  # what torch.distributed raises
        fix = "NCCL_DEBUG=INFO (or TORCH_DISTRIBUTED_DEBUG=DETAIL) says where; check firewall and network interface"
        return {node: [*own, Check("all-reduce", "sick", str(error).strip().splitlines()[0], fix)]}
    finally:
        dist.destroy_process_group()


def connect(ranks: Ranks, seconds: float) -> dist.Store:
    """The job's key-value store, which does not wait for anybody; torchrun's own where it runs one."""
    host = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(
        address, port, ranks.world_size, host, timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True
    )
    return dist.PrefixStore("doctor", store)


def _together(node: str, own: list[Check], speed: DeviceSpeed, device: torch.device) -> Nodes:
    gathered: list[tuple[str, list[Check], DeviceSpeed]] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(gathered, (node, own, speed))
    places: dict[str, list[int]] = {}
    nodes: Nodes = {}
    for rank, (name, checks, _) in enumerate(gathered):
        places.setdefault(name, []).append(rank)
        nodes.setdefault(name, []).extend(checks)
    if device.type == "cuda":  # CPU ranks share cores, and slow each other
        for rank, check in lagging_checks({rank: speed for rank, (*_, speed) in enumerate(gathered)}).items():
            nodes[gathered[rank][0]].append(check)
    for found in (node_checks(node_rates(places, device)), pair_checks(pair_rates(places, device))):
        for name, checks in found.items():
            nodes[name].extend(checks)
    return nodes
