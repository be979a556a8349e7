"""Process groups of a run: tensor-parallel ranks are neighbors, the rest is data parallel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megacog.errors import ConfigError
from megacog.parallel.tensor import TensorParallel


class ModelParallelUnit:
    """What DeepSpeed asks about model parallelism.

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
        return self._groups.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.data_size

    def get_data_parallel_group(self) -> Any:
        return self._groups.data_group


@dataclass(frozen=True)
class ProcessGroups:
    """This rank's tensor-parallel and data-parallel groups."""

    tensor: TensorParallel
    data_rank: int
    data_size: int
    data_group: Any

    @property
    def mpu(self) -> ModelParallelUnit:
        return ModelParallelUnit(self)


def build_process_groups(tensor: int) -> ProcessGroups:
    """Cut the world into tensor-parallel groups of `tensor` neighboring ranks.

    Collective over all ranks; torch.distributed must be initialized.

    Raises:
        ConfigError: The world size is not a multiple of `tensor`.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if world % tensor:
        raise ConfigError(f"parallel.tensor = {tensor} does not divide the {world} ranks of this run; start a multiple")
    tensor_group = data_group = None
    for first in range(0, world, tensor):
        group = dist.new_group(list(range(first, first + tensor)))
        if first <= rank < first + tensor:
            tensor_group = group
    for first in range(tensor):
        group = dist.new_group(list(range(first, world, tensor)))
        if rank % tensor == first:
            data_group = group
    return ProcessGroups(
        tensor=TensorParallel(rank % tensor, tensor, tensor_group),
        data_rank=rank // tensor,
        data_size=world // tensor,
        data_group=data_group,
    )
