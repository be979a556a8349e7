"""Silent corruption: ranks that hold the same weights compare a sum over their bits.

Data-parallel (and sequence-parallel) ranks hold the same weights, bit for bit: with ZeRO 0 to 2 and the plain engine
all of them, trained and frozen, also those in fp8. ZeRO 3 cuts weights, so it has no copies but of some small tensors.
Tensor-parallel ranks hold different parts and are compared with their own kind.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacog.errors import MegacogError

_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CorruptWeightsError(MegacogError):
    """Ranks that must hold the same weights hold different ones."""


def bit_sum(tensor: Tensor) -> Tensor:
    """int64 []: sum of the elements' bits as integers, which any single flipped bit changes. One pass, no copy."""
    return tensor.detach().view(_AS_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


def compare_replicas(model: nn.Module, tensor_rank: int, step: int) -> None:
    """Check that all ranks of this tensor-parallel rank hold the same weights. Collective over all ranks.

    Args:
        model: This rank's.
        tensor_rank: Which part of the weights it holds.
        step: For the message.

    Raises:
        CorruptWeightsError: On all ranks; names ranks, hosts and tensors. Of two ranks it cannot be told which one is
            wrong, of more it is the minority.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    names, sums_K = zip(*((name, bit_sum(tensor)) for name, tensor in _tensors(model)), strict=True)
    own_K = torch.stack(sums_K)
    place = torch.arange(1, 2 * len(names), 2, device=own_K.device)  # odd: no difference is multiplied away
    found = _gathered(torch.stack([torch.tensor(tensor_rank, device=own_K.device), (own_K * place).sum()]))
    kinds = [row[0] for row in found]
    wrong: set[int] = set()
    for kind in set(kinds):
        wrong |= set(_minority({rank: total for rank, (other, total) in enumerate(found) if other == kind}))
    if not wrong:
        return
    sums_RK = _gathered(own_K)
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    problems = []
    for rank in sorted(wrong):
        others = [row for other, row in enumerate(sums_RK) if kinds[other] == kinds[rank] and other != rank]
        different = [name for k, name in enumerate(names) if any(row[k] != sums_RK[rank][k] for row in others)]
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        problems.append(f"rank {rank} on {hosts[rank]}: {', '.join(different[:3])}{more}")
    copies = len(kinds) // len(set(kinds))
    unsure = " (one of them is right, which one cannot be told)" if copies == 2 else ""
    raise CorruptWeightsError(
        f"step {step}: weights that all data-parallel ranks must hold alike differ on {'; '.join(problems)}{unsure}. "
        "Memory, a device or a link there is faulty: resume without that machine"
    )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _gathered(values: Tensor) -> list[list[int]]:
    """The int64 values of all ranks, in rank order."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts).tolist()


def _minority(sums: dict[int, int]) -> list[int]:
    """Ranks whose sum is not the one that most ranks have; all of them if no sum is that of a majority."""
    most, count = Counter(sums.values()).most_common(1)[0]
    if 2 * count > len(sums):
        return [rank for rank, value in sums.items() if value != most]
    return list(sums)
