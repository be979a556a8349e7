"""Process groups of a run: tensor-parallel ranks are neighbors, then those of a sequence; the rest is data parallel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megacog.errors import ConfigError
from megacog.parallel.sequence import SequenceParallel
from megacog.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Replicas:
    """This rank's place among the ranks that hold the same part of the weights: they average their gradients."""

    rank: int = 0
    size: int = 1
    group: Any = None


class ModelParallelUnit:
    """What DeepSpeed asks about model parallelism; replicas are its data-parallel ranks.

    Exactly these six methods: with more (sequence parallel ones, say) DeepSpeed silently reduces
    over other groups.
    """

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups

    def get_model_parallel_rank(self) -> int:
        return self._groups.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._groups.tensor.size

    def get_model_parallel_group(self) -> Any:
        return self._groups.tensor.group

    def get_data_parallel_rank(self) -> int:
        return self._groups.replicas.rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.replicas.size

    def get_data_parallel_group(self) -> Any:
        return self._groups.replicas.group


@dataclass(frozen=True)
class ProcessGroups:
    """This rank's place in the run; without arguments, that of a run of one rank."""

    tensor: TensorParallel = TensorParallel()
    sequence: SequenceParallel = SequenceParallel()
    replicas: Replicas = Replicas()

    @property
    def data_rank(self) -> int:
        """Which share of the samples is this rank's; ranks of one sequence have the same."""
        return self.replicas.rank // self.sequence.size

    @property
    def data_size(self) -> int:
        """How many shares of the samples there are."""
        return self.replicas.size // self.sequence.size

    @property
    def mpu(self) -> ModelParallelUnit:
        return ModelParallelUnit(self)


def build_process_groups(tensor: int, sequence: int = 1) -> ProcessGroups:
    """Cut the world into data x sequence x tensor ranks, the last of them neighbors.

    Collective over all ranks; torch.distributed must be initialized.

    Raises:
        ConfigError: The world size is not a multiple of `tensor` x `sequence`.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    block = tensor * sequence
    keys = {"parallel.tensor": tensor, "parallel.sequence": sequence, "parallel.tensor x parallel.sequence": block}
    for key, size in keys.items():
        if world % size:
            raise ConfigError(f"{key} = {size} does not divide the {world} ranks of this run; start a multiple")
    share, place = divmod(rank, tensor)
    tensor_group = _new_groups(range(first, first + tensor) for first in range(0, world, tensor))
    sequence_group = None
    if sequence > 1:
        starts = (start + first for start in range(0, world, block) for first in range(tensor))
        sequence_group = _new_groups(range(start, start + block, tensor) for start in starts)
    replica_group = _new_groups(range(first, world, tensor) for first in range(tensor))
    return ProcessGroups(
        TensorParallel(place, tensor, tensor_group),
        SequenceParallel(share % sequence, sequence, sequence_group),
        Replicas(share, world // tensor, replica_group),
    )


def _new_groups(all_ranks: Iterable[range]) -> Any:
    """Make the groups of the given ranks, which every rank must ask for; the one that this rank is in."""
    mine = None
    for ranks in all_ranks:
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            mine = group
    return mine
