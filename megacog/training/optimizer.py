"""AdamW's parameter groups and the gradient norm, the same for every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacog.config.schema import TrainConfig
from megacog.parallel.tensor import TensorParallel


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter: to all but biases and layer norms."""
    return not (name.endswith(".bias") or "layernorm" in name)


def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], train: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters, in two groups: with weight decay and without."""
    named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if decays(name)], "weight_decay": train.weight_decay},
        {"params": [p for name, p in named if not decays(name)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = True if train.offload_optimizer or updates_on_gpu(named) else None
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, eps=train.eps, fused=fused)


def updates_on_gpu(named: Iterable[tuple[str, nn.Parameter]]) -> bool:
    """Whether AdamW runs on a GPU. There, and in a host's memory, one fused pass is what counts: torch's loop makes a
    dozen. Small models on CPUs are as fast either way."""
    return any(parameter.is_cuda for _, parameter in named)


def before_update(optimizer: torch.optim.Optimizer, action: Callable[[], None]) -> None:
    """Have `action` run before every change of weights and optimizer states from now on."""
    optimizer.register_step_pre_hook(lambda *_: action())


def global_norm(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor], parallel: TensorParallel) -> Tensor:
    """The L2 norm of all gradients of the whole model: fp32 scalar, the same on every rank.

    Tensor-parallel shards count on every rank, replicated tensors once. Collective over `parallel`.
    """
    squares: dict[bool, list[Tensor]] = {True: [], False: []}
    device = None
    for parameter, gradient in zip(parameters, gradients, strict=True):
        sharded = bool(getattr(parameter, "tensor_model_parallel", False))
        squares[sharded].append(gradient.detach().float().norm() ** 2)
        device = gradient.device
    sharded_sum = torch.stack(squares[True]).sum() if squares[True] else torch.zeros((), device=device)
    if parallel.size > 1:
        dist.all_reduce(sharded_sum, group=parallel.group)
    return (sharded_sum + sum(squares[False])).sqrt()
