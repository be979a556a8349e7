"""All-reduce between nodes, two at a time, so that a slow one has a name."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megacog.doctor.check import Check
from megacog.runtime.speed import synchronize

Key = TypeVar("Key")
Pair = tuple[str, str]
Places = Mapping[str, Sequence[int]]
"""Ranks of every node."""
GPU_BYTES, CPU_BYTES = 256 << 20, 16 << 20
_REPEATS = 5
SLOW_SHARE = 0.5
"""Of the median: below it a link is slow."""
_POLL_SECONDS = 0.1


def missing_ranks(store: dist.Store, rank: int, world_size: int, node: str, seconds: float) -> list[int]:
    """Tell the others of this rank and wait for them; those that have not appeared after `seconds`.

    The same answer on every rank that appeared: rank 0's.
    """
    store.set(f"doctor/{rank}", node)
    if rank:
        store.wait(["doctor/missing"], timedelta(seconds=2 * seconds + 30))
        return [int(number) for number in store.get("doctor/missing").decode().split()]
    deadline, missing = time.monotonic() + seconds, list(range(world_size))
    while missing and time.monotonic() < deadline:
        missing = [other for other in missing if not store.check([f"doctor/{other}"])]
        time.sleep(_POLL_SECONDS if missing else 0)
    store.set("doctor/missing", " ".join(map(str, missing)))
    return missing


def pair_rounds(nodes: Sequence[str]) -> list[list[Pair]]:
    """Every pair of nodes once, in rounds whose pairs have no node in common (a round-robin tournament)."""
    ring: list[str | None] = [*nodes] + ([None] if len(nodes) % 2 else [])
    rounds = []
    for _ in range(len(ring) - 1):
        opposite = zip(ring[: len(ring) // 2], reversed(ring[len(ring) // 2 :]), strict=True)
        rounds.append([(a, b) for a, b in opposite if a is not None and b is not None])
        ring[1:] = [ring[-1], *ring[1:-1]]
    return rounds


def pair_rates(places: Places, device: torch.device) -> dict[Pair, float]:
    """Bus bandwidth of every pair of nodes, bytes per second. Collective; the same on all ranks.

    Disjoint pairs are measured at the same time, as a training step loads the network.
    """
    found: dict[Pair, float] = {}
    for pairs in pair_rounds(list(places)):
        members = {pair: sorted([*places[pair[0]], *places[pair[1]]]) for pair in pairs}
        found |= _group_rates(members, device)
    return found


def node_rates(places: Places, device: torch.device) -> dict[str, float]:
    """Bus bandwidth among the ranks of each node that has several. Collective; the same on all ranks."""
    return _group_rates({node: sorted(ranks) for node, ranks in places.items() if len(ranks) > 1}, device)


def _group_rates(members: Mapping[Key, Sequence[int]], device: torch.device) -> dict[Key, float]:
    rank, own = dist.get_rank(), {}
    groups = {key: dist.new_group(list(ranks)) for key, ranks in members.items()}  # all first: they run at once
    for key, ranks in members.items():
        if rank in ranks:
            rate = _all_reduce_rate(groups[key], len(ranks), device)
            if rank == ranks[0]:
                own[key] = rate
            dist.destroy_process_group(groups[key])
    gathered: list[dict[Key, float] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return {key: rate for part in gathered if part for key, rate in part.items()}


def _all_reduce_rate(group: dist.ProcessGroup | None, size: int, device: torch.device) -> float:
    data = torch.ones((GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4, device=device)
    dist.all_reduce(data, group=group)  # connects
    synchronize(device)
    times = []
    for _ in range(_REPEATS):
        data.fill_(1.0)
        synchronize(device)
        start = time.perf_counter()
        dist.all_reduce(data, group=group)
        synchronize(device)
        times.append(time.perf_counter() - start)
    if not bool((data == size).all()):
        raise RuntimeError(f"the all-reduce of {size} ranks gave wrong sums")
    return 2 * (size - 1) / size * data.nbytes / statistics.median(times)


def pair_checks(rates: Mapping[Pair, float]) -> dict[str, list[Check]]:
    """A check per node: a slow node is slow with every other, a slow link only with one."""
    nodes = sorted({node for pair in rates for node in pair})
    typical = statistics.median(rates.values()) if rates else 0.0
    found = {}
    for node in nodes:
        own = {next(other for other in pair if other != node): rate for pair, rate in rates.items() if node in pair}
        best, worst = max(own.values()), min(own, key=lambda other: own[other])
        value = f"{best / 1e9:.3g} GB/s at best, {own[worst] / 1e9:.3g} with {worst}"
        found[node] = [_pair_check(value, best, own[worst], typical, len(nodes), worst)]
    return found


def _pair_check(value: str, best: float, worst: float, typical: float, nodes: int, partner: str) -> Check:
    name = "all-reduce between nodes"
    beside = f"{value}; the median pair has {typical / 1e9:.3g}"
    if nodes > 2 and best < SLOW_SHARE * typical:
        fix = "leave this node out; check its network card, cable and NCCL_SOCKET_IFNAME / NCCL_IB_HCA"
        return Check(name, "sick", beside, fix)
    if nodes > 2 and worst < SLOW_SHARE * typical:
        return Check(name, "warning", beside, f"see {partner} and the link")
    return Check(name, "ok", value)


def node_checks(rates: Mapping[str, float]) -> dict[str, list[Check]]:
    """A check per node with several ranks: slow links within one hold up all."""
    typical = statistics.median(rates.values()) if rates else 0.0
    name, found = "all-reduce within the node", {}
    for node, rate in rates.items():
        value = f"{rate / 1e9:.3g} GB/s"
        check = Check(name, "ok", value)
        if len(rates) > 2 and rate < SLOW_SHARE * typical:
            fix = "leave this node out; nvidia-smi topo -m and nvidia-smi nvlink -s show its links"
            check = Check(name, "sick", f"{value}; the median node has {typical / 1e9:.3g}", fix)
        found[node] = [check]
    return found
