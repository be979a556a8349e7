"""The plain engine: data, tensor and sequence parallel training with torch alone.

The oracle that DeepSpeed is checked against, and `train.engine: torch`. Every rank holds all
master weights and moments; gradients are averaged in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacog.config.schema import Config
from megacog.model.transformer import CogVideo, LossOutput
from megacog.parallel.groups import ProcessGroups
from megacog.training.optimizer import before_update, build_optimizer, global_norm
from megacog.training.precision import DTYPES


class PlainEngine:
    """See `megacog.training.engine.Engine` for the contract.

    Args:
        config: The run.
        model: Holds this rank's initial weights; converted to the run's precision.
        groups: This rank's process groups.
        accumulation: Micro batches per optimizer step.
    """

    def __init__(self, config: Config, model: CogVideo, groups: ProcessGroups, accumulation: int) -> None:
        self.model = model.to(DTYPES[config.train.precision])
        self.grad_norm = 0.0
        self._groups = groups
        self._accumulation = accumulation
        self._clip = config.train.gradient_clip
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # In fp32 the weights are their own masters. In bf16 the masters start from the rounded weights,
        # as DeepSpeed's do: what is trained is what the model computes with.
        self._masters = {
            name: weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            for name, weight in self._weights.items()
        }
        summed_in = DTYPES[config.train.gradient_dtype]
        self._sums = {name: torch.zeros_like(master, dtype=summed_in) for name, master in self._masters.items()}
        self._optimizer = build_optimizer(self._masters.items(), config.train)

    def forward(self, **inputs: Any) -> LossOutput:
        return self.model(**inputs)

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulation).backward()
        for name, weight in self._weights.items():
            if weight.grad is not None:
                self._sums[name] += weight.grad
                weight.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> bool:
        gradients = [total.float() for total in self._sums.values()]
        replicas = self._groups.replicas
        if replicas.size > 1:
            for gradient in gradients:
                dist.all_reduce(gradient, group=replicas.group)
                gradient /= replicas.size
        norm = global_norm(self._weights.values(), gradients, self._groups.tensor)
        self.grad_norm = float(norm)
        applied = bool(norm.isfinite())
        if applied:
            self._update(learning_rate, gradients, norm)
        for total in self._sums.values():
            total.zero_()
        return applied

    def _update(self, learning_rate: float, gradients: list[Tensor], norm: Tensor) -> None:
        scale = (self._clip / (norm + 1e-6)).clamp(max=1.0) if self._clip else 1.0
        for master, gradient in zip(self._masters.values(), gradients, strict=True):
            master.grad = gradient * scale
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        for name, weight in self._weights.items():
            self._masters[name].grad = None
            if weight is not self._masters[name]:
                weight.copy_(self._masters[name])

    def before_update(self, action: Callable[[], None]) -> None:
        before_update(self._optimizer, action)

    def weight(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach()

    def get_state(self, name: str) -> dict[str, Tensor]:
        master = self._masters[name]
        adam = self._optimizer.state.get(master) or {
            "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master), "step": torch.zeros(()),
        }  # fmt: skip
        state = {"weight": self.weight(name)} | {field: adam[field] for field in ("exp_avg", "exp_avg_sq", "step")}
        if self._weights[name] is not master:
            state["master"] = master.detach()
        return state

    def prepare_states(self, **inputs: Any) -> None:
        """Nothing: states are made in `set_state`."""

    @torch.no_grad()
    def set_state(self, name: str, state: dict[str, Tensor]) -> None:
        master = self._masters[name]
        master.copy_(state.get("master", state["weight"]))
        self._weights[name].copy_(state["weight"])
        self._optimizer.state[master] = {
            "step": state["step"].to(master.device, torch.float32, copy=True),
            "exp_avg": state["exp_avg"].to(master).clone(),
            "exp_avg_sq": state["exp_avg_sq"].to(master).clone(),
        }

    @contextmanager
    def whole_model(self) -> Iterator[CogVideo]:
        yield self.model
