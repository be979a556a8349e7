"""All-reduce between nodes, two at a time, so that a slow one has a name."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megacog.doctor.check import Check
from megacog.runtime.speed import synchronize

Pair = tuple[str, str]
Places = Mapping[str, Sequence[int]]
"""Ranks of every node."""
Groups = dict[tuple[str, ...], Sequence[int]]
"""Ranks that are measured together, by the names of their node or nodes."""
GPU_BYTES, CPU_BYTES = 256 << 20, 16 << 20
_REPEATS = 5
SLOW_SHARE = 0.5
"""Of the median: below it a link is slow."""
_NETWORK = "check its network card, cable and NCCL_SOCKET_IFNAME / NCCL_IB_HCA"


def pair_rounds(nodes: Sequence[str]) -> list[list[Pair]]:
    """Every pair of nodes once, in rounds whose pairs have no node in common (a round-robin tournament)."""
    ring: list[str | None] = [*nodes] + ([None] if len(nodes) % 2 else [])
    rounds = []
    for _ in range(len(ring) - 1):
        opposite = zip(ring[: len(ring) // 2], reversed(ring[len(ring) // 2 :]), strict=True)
        rounds.append([(a, b) for a, b in opposite if a is not None and b is not None])
        ring[1:] = [ring[-1], *ring[1:-1]]
    return rounds


def rounds_of(places: Places) -> list[Groups]:
    """Who is measured together, round after round: the ranks within each node, then all pairs of nodes.

    Disjoint groups are measured at the same time, as a training step loads the network.
    """
    within: Groups = {(node,): ranks for node, ranks in places.items() if len(ranks) > 1}
    rounds = [within] if within else []
    for pairs in pair_rounds(list(places)):
        rounds.append({(a, b): [*places[a], *places[b]] for a, b in pairs})
    return rounds


def group_rate(store: dist.Store, rank: int, ranks: Sequence[int], device: torch.device, seconds: float) -> float:
    """Bus bandwidth among these ranks, bytes per second. Collective of these ranks alone, whoever else is sick.

    Raises:
        RuntimeError: As torch.distributed raises it: they do not reach each other within `seconds`, or a sum is wrong.
    """
    backend, limit = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=seconds)
    dist.init_process_group(backend, store=store, rank=ranks.index(rank), world_size=len(ranks), timeout=limit)
    try:
        return _all_reduce_rate(len(ranks), device)
    finally:
        dist.destroy_process_group()


def _all_reduce_rate(size: int, device: torch.device) -> float:
    data = torch.ones((GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4, device=device)
    dist.all_reduce(data)  # connects
    synchronize(device)
    times = []
    for _ in range(_REPEATS):
        data.fill_(1.0)
        synchronize(device)
        start = time.perf_counter()
        dist.all_reduce(data)
        synchronize(device)
        times.append(time.perf_counter() - start)
    if not bool((data == size).all()):
        raise RuntimeError(f"the all-reduce of {size} ranks gave wrong sums")
    return 2 * (size - 1) / size * data.nbytes / statistics.median(times)


def pair_checks(rates: Mapping[Pair, float]) -> dict[str, list[Check]]:
    """A check per node: a slow node is slow with every other, a slow link only with one.

    Args:
        rates: Of every pair; 0 where the all-reduce failed.
    """
    nodes = sorted({node for pair in rates for node in pair})
    working = [rate for rate in rates.values() if rate]
    typical = statistics.median(working) if working else 0.0
    found = {}
    for node in nodes:
        own = {next(other for other in pair if other != node): rate for pair, rate in rates.items() if node in pair}
        best, worst = max(own.values()), min(own, key=lambda other: own[other])
        value = f"{best / 1e9:.3g} GB/s at best, {_rate(own[worst])} with {worst}"
        found[node] = [_pair_check(value, best, own[worst], typical, len(nodes), worst)]
    return found


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.3g}" if rate else "none"


def _pair_check(value: str, best: float, worst: float, typical: float, nodes: int, partner: str) -> Check:
    name = "all-reduce between nodes"
    if not best:
        fix = f"its ranks say why on stderr, NCCL_DEBUG=INFO says more; {_NETWORK}"
        return Check(name, "sick", "fails with every other node", fix)
    beside = f"{value}; the median pair has {typical / 1e9:.3g}"
    if nodes > 2 and best < SLOW_SHARE * typical:
        return Check(name, "sick", beside, f"leave this node out; {_NETWORK}")
    if nodes > 2 and worst < SLOW_SHARE * typical:
        return Check(name, "warning", beside, f"see {partner} and the link")
    return Check(name, "ok", value)


def node_checks(rates: Mapping[str, float]) -> dict[str, list[Check]]:
    """A check per node with several ranks: slow links within one hold up all.

    Args:
        rates: Of every such node; 0 where the all-reduce failed.
    """
    typical = statistics.median(rates.values()) if rates else 0.0
    name, found = "all-reduce within the node", {}
    fix = "leave this node out; nvidia-smi topo -m and nvidia-smi nvlink -s show its links"
    for node, rate in rates.items():
        value = f"{rate / 1e9:.3g} GB/s"
        check = Check(name, "ok", value)
        if not rate:
            check = Check(name, "sick", "fails", f"its ranks say why on stderr; {fix}")
        elif len(rates) > 2 and rate < SLOW_SHARE * typical:
            check = Check(name, "sick", f"{value}; the median node has {typical / 1e9:.3g}", fix)
        found[node] = [check]
    return found
