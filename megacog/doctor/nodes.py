"""Checks that need torch: this process's device, and all nodes of a job together."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megacog.doctor.board import Board
from megacog.doctor.check import Check, Nodes
from megacog.doctor.devices import DeviceSpeed, device_checks, lagging_checks, measure_device
from megacog.doctor.machine import gpu_checks
from megacog.doctor.network import Groups, group_rate, node_checks, pair_checks, rounds_of
from megacog.errors import EnvError
from megacog.runtime.hardware import available_cores, describe_device, rank_device
from megacog.runtime.ranks import Ranks, ranks_by_host


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
    """The checks of all nodes with those between them; the same on all ranks.

    Raises:
        EnvError: Rank 0 cannot be reached, or does not wait for this rank any more.
    """
    try:
        board = Board(connect(ranks, seconds), ranks.rank, seconds)
        note = {"node": node, "checks": [asdict(check) for check in own], "speed": asdict(speed)}
        notes = board.gather("start", note, range(ranks.world_size))
        found = _together(board, notes, device, ranks) if ranks.rank in notes else None
        board.leave(notes)
    except RuntimeError as error:  # what torch.distributed raises
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise EnvError(
            f"rank {ranks.rank} on {node} cannot reach rank 0 at {place} ({_first_line(error)}); "
            "see whether rank 0 runs, and check firewall and network interface"
        ) from None
    if found is None:
        raise EnvError(
            f"rank {ranks.rank} on {node} came when rank 0 had waited {seconds:.0f} s and gone on without it; "
            "see what holds this node up, or give more --seconds"
        )
    return found


def connect(ranks: Ranks, seconds: float) -> dist.Store:
    """The job's key-value store, which does not wait for anybody; torchrun's own where it runs one."""
    host = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(
        address, port, ranks.world_size, host, timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True
    )
    return dist.PrefixStore("doctor", store)


def _together(board: Board, notes: Mapping[int, Any], device: torch.device, ranks: Ranks) -> Nodes:
    """The checks of all nodes, from what their ranks have noted of themselves."""
    places: dict[str, list[int]] = {}
    nodes: Nodes = {}
    for rank, note in sorted(notes.items()):
        places.setdefault(note["node"], []).append(rank)
        nodes.setdefault(note["node"], []).extend(Check(**check) for check in note["checks"])
    if device.type == "cuda":  # CPU ranks share cores, and slow each other
        speeds = {rank: DeviceSpeed(**note["speed"]) for rank, note in notes.items()}
        for rank, check in lagging_checks(speeds).items():
            nodes[notes[rank]["node"]].append(check)
    found = [missing_checks(places, ranks_by_host(ranks, os.environ), ranks.world_size, board.seconds)]
    whole = {node: members for node, members in places.items() if node not in found[0]}
    found += _links(board, notes, whole, device)
    for checks in found:
        for node, added in checks.items():
            nodes.setdefault(node, []).extend(added)
    return nodes


def missing_checks(
    places: Mapping[str, Sequence[int]], expected: Mapping[str, int], world_size: int, seconds: float
) -> Nodes:
    """A check for every node of which ranks have not appeared.

    Args:
        places: Ranks that have, by node.
        expected: How many each node should have; empty where the launcher does not say, and then the missing ranks
            themselves stand for their node.
        world_size: How many there should be in all.
        seconds: They were waited for.
    """
    missing = sorted({*range(world_size)} - {rank for ranks in places.values() for rank in ranks})
    if missing and not expected:
        return {f"node of rank {', '.join(map(str, missing))}": [_silent(f"not seen in {seconds:.0f} s")]}
    few = {node: (len(places.get(node, ())), count) for node, count in expected.items()}
    return {
        node: [_silent(f"{seen} of {count} seen in {seconds:.0f} s")]
        for node, (seen, count) in few.items()
        if seen < count
    }


def _silent(value: str) -> Check:
    fix = "see what they say: their node does not start them, holds them up, or cannot reach rank 0"
    return Check("ranks", "sick", value, fix)


def _links(
    board: Board, notes: Mapping[int, Any], places: Mapping[str, list[int]], device: torch.device
) -> list[Nodes]:
    """All-reduce within and between these nodes. A rank that goes silent takes its node out of what follows."""
    present, silent = set(notes), Nodes()
    rates: dict[tuple[str, ...], float] = {}
    for number, groups in enumerate(rounds_of(places)):
        working = {key: group for key, group in groups.items() if not silent.keys() & set(key)}
        seen = board.gather(f"round {number}", _own_rate(board, number, working, device), present)
        for rank in sorted(present - seen.keys()):
            silent[notes[rank]["node"]] = [_silent(f"rank {rank} went silent in an all-reduce")]
        present &= seen.keys()
        rates |= {key: min(seen.get(rank) or 0.0 for rank in group) for key, group in working.items()}
    within = {key[0]: rate for key, rate in rates.items() if len(key) == 1}
    between = {(key[0], key[1]): rate for key, rate in rates.items() if len(key) == 2}
    return [silent, node_checks(within), pair_checks(between)]


def _own_rate(board: Board, number: int, groups: Groups, device: torch.device) -> float | None:
    """What this rank measures in its group, if it is in one; 0 when that fails."""
    for key, members in groups.items():
        if board.rank in members:
            store = dist.PrefixStore(f"round {number} of {key}", board.store)
            try:
                return group_rate(store, board.rank, members, device, board.seconds / 3)
            except RuntimeError as error:  # what torch.distributed raises
                print(f"rank {board.rank}: all-reduce of {' and '.join(key)}: {_first_line(error)}", file=sys.stderr)
                return 0.0
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
