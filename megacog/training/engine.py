"""What the training loop asks of an engine, and DeepSpeed behind it.

The only file that imports deepspeed. What DeepSpeed needs to be right is kept here in one place:
- its shared-memory op would be compiled at start-up, so it is switched off; the optimizer is torch's;
- fp32 sums of bf16 gradients (`train.gradient_dtype`) make ZeRO 1 use its BF16_Optimizer;
- with ZeRO 0 it reports no gradient norm and does not skip non-finite steps, so this file does both;
- its hooks hang on tensors that the module returns: a dataclass would pass them by, silently;
- optimizer state exists only after a first step, and ZeRO 3 pads its partitions;
- an offloaded optimizer would be its own, compiled at start-up: it is told to take torch's, which is fused on CPUs too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megacog.config.schema import Config
from megacog.errors import ConfigError
from megacog.model.transformer import CogVideo, LossOutput
from megacog.parallel.groups import ProcessGroups
from megacog.training.optimizer import before_update, build_optimizer, global_norm
from megacog.training.plain_engine import PlainEngine


class Engine(Protocol):
    """Runs forward, backward and optimizer steps of one model on this rank.

    All calls are collective: every rank makes the same ones in the same order.
    """

    model: CogVideo
    grad_norm: float
    """Global gradient norm of the last step before clipping; not finite if it was skipped."""

    def forward(self, **inputs: Any) -> LossOutput:
        """The model's forward with these keyword arguments."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro batch, weighted 1 / accumulation."""
        ...

    def step(self, learning_rate: float) -> bool:
        """Average over replicas, clip, update; False if gradients were not finite (nothing changes)."""
        ...

    def before_update(self, action: Callable[[], None]) -> None:
        """Have `action` run before every change of weights and optimizer states by `step`."""
        ...

    def weight(self, name: str) -> Tensor:
        """This tensor-parallel rank's part of any parameter, frozen ones too."""
        ...

    def get_state(self, name: str) -> dict[str, Tensor]:
        """weight, exp_avg, exp_avg_sq, step and, if the weight is not fp32, master of a trained parameter: copies, or
        what the next step changes (see `before_update`).

        Tensors have the shape of this tensor-parallel rank's part, whatever ZeRO does with them.
        """
        ...

    def prepare_states(self, **inputs: Any) -> None:
        """Must run once before `set_state`; `inputs` are any valid forward arguments."""
        ...

    def set_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Restore what `get_state` gave. The weight itself must be in the model when the engine is built."""
        ...

    def whole_model(self) -> AbstractContextManager[CogVideo]:
        """A model with all weights of this tensor-parallel rank in place, for use outside `forward`."""
        ...


def build_engine(config: Config, model: CogVideo, groups: ProcessGroups, accumulation: int) -> Engine:
    """The engine that `train.engine` names. Trained parameters are those with requires_grad."""
    engine = PlainEngine if config.train.engine == "torch" else DeepSpeedEngine
    return engine(config, model, groups, accumulation)


def deepspeed_config(config: Config, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a run; `config.deepspeed` is merged in last but cannot change what megacog sets."""
    train = config.train
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # Without ZeRO DeepSpeed clips, but tells no norm and steps on non-finite gradients: done in this file.
        "gradient_clipping": train.gradient_clip if train.zero_stage else 0.0,
        "zero_optimization": {"stage": train.zero_stage},
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }
    if train.offload_optimizer:
        generated["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        generated["zero_force_ds_cpu_optimizer"] = False
    if train.precision == "bf16":
        generated["data_types"] = {"grad_accum_dtype": train.gradient_dtype}
        generated["bf16"]["check_grad_overflow"] = True
    return _merge(generated, config.deepspeed, "deepspeed")


def _merge(generated: dict[str, Any], extra: dict[str, Any], where: str) -> dict[str, Any]:
    merged = dict(generated)
    for key, value in extra.items():
        path = f"{where}.{key}"
        if isinstance(value, dict) and isinstance(merged.get(key, {}), dict):
            merged[key] = _merge(merged.get(key, {}), value, path)
        elif key in generated and generated[key] != value:
            raise ConfigError(
                f"{path}: {value!r} contradicts {generated[key]!r}, which megacog derives from the train section; "
                "remove it here and set it there"
            )
        else:
            merged[key] = value
    return merged


def import_deepspeed() -> Any:
    """The package, quiet (its logger is called DeepSpeed) and without its op that needs a compiler."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class _TensorOutputs(nn.Module):
    """The model with its loss as a tuple of tensors, which is what DeepSpeed hangs its hooks on.

    Without those hooks gradient accumulation is wrong in bf16 (2.6 times the norm with 4 micro batches).
    """

    def __init__(self, model: CogVideo) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        output = self.model(**inputs)
        return output.loss, output.frame_loss_Q


class DeepSpeedEngine:
    """ZeRO 1-3 in bf16 and fp32, ZeRO 0 in fp32; see `Engine`. torch.distributed must be initialized."""

    def __init__(self, config: Config, model: CogVideo, groups: ProcessGroups, accumulation: int) -> None:
        self._deepspeed = import_deepspeed()
        self.model = model
        self.grad_norm = 0.0
        self._config = config
        self._groups = groups
        self._accumulation = accumulation
        self._zero = config.train.zero_stage
        self._micro_step = 0
        self._has_states = False
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._deepspeed.init_distributed(verbose=False)
        with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints memory tables
            self._engine, *_ = self._deepspeed.initialize(
                model=_TensorOutputs(model),
                optimizer=build_optimizer(model.named_parameters(), config.train),
                config=deepspeed_config(config, accumulation),
                mpu=groups.mpu,
                dist_init_required=False,
            )
        self._optimizer: torch.optim.Optimizer = self._engine.basic_optimizer

    def forward(self, **inputs: Any) -> LossOutput:
        return LossOutput(*self._engine(**inputs))

    def backward(self, loss: Tensor) -> None:
        if self._micro_step:  # DeepSpeed counts micro batches by its own step calls
            self._engine.step()
        self._engine.backward(loss)
        self._micro_step += 1

    def step(self, learning_rate: float) -> bool:
        if self._micro_step != self._accumulation:
            raise RuntimeError(f"step after {self._micro_step} micro batches, not {self._accumulation}")
        self._micro_step = 0
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        applied = self._step_without_zero() if self._zero == 0 else self._step_with_zero()
        self._has_states |= applied
        return applied

    def _step_with_zero(self) -> bool:
        self._engine.step()
        self.grad_norm = float(self._engine.get_global_grad_norm())
        applied = bool(self._engine.was_step_applied())
        if applied and not self._has_states:
            self._link_states()
        return applied

    def _link_states(self) -> None:
        """Let DeepSpeed's getters find the state of every parameter group.

        ZeRO 1 and 2 link states after the step of the first group, when the second has none yet.
        """
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def _step_without_zero(self) -> bool:
        trained = [p for p in self._parameters.values() if p.grad is not None]
        norm = global_norm(trained, [p.grad for p in trained if p.grad is not None], self._groups.tensor)
        self.grad_norm = float(norm)
        applied = bool(norm.isfinite())
        clip = self._config.train.gradient_clip
        for parameter in trained:
            if not applied:
                parameter.grad = None  # AdamW passes over parameters without a gradient
            elif clip and parameter.grad is not None:
                parameter.grad *= (clip / (norm + 1e-6)).clamp(max=1.0)
        self._engine.step()
        return applied

    def before_update(self, action: Callable[[], None]) -> None:
        before_update(self._optimizer, action)

    def weight(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        if self._zero < 3:
            return parameter.detach()
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def get_state(self, name: str) -> dict[str, Tensor]:
        parameter, weight = self._parameters[name], self.weight(name)
        state = {"weight": weight}
        if weight.dtype != torch.float32:
            state["master"] = self._master(parameter)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = self._moment(parameter, moment, weight)
        state["step"] = self._adam_step()
        return state

    def _master(self, parameter: nn.Parameter) -> Tensor:
        if self._is_whole_here():
            return self._fragment(parameter, None)
        return self._deepspeed.utils.safe_get_full_fp32_param(parameter)

    def _is_whole_here(self) -> bool:
        """Whether ZeRO 1 or 2 has nothing to gather: its getters would copy and reduce all the same."""
        return 0 < self._zero < 3 and self._groups.replicas.size == 1

    def _fragment(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """A master, or a moment, as DeepSpeed holds it: all of it with one replica."""
        return parameter._hp_mapping.get_hp_fragment(moment).view_as(parameter)  # type: ignore[attr-defined]

    def _moment(self, parameter: nn.Parameter, moment: str, weight: Tensor) -> Tensor:
        if not self._has_states:
            return torch.zeros_like(weight, dtype=torch.float32)
        if self._zero == 0:
            return self._optimizer.state[parameter][moment]
        if self._is_whole_here():
            return self._fragment(parameter, moment)
        return self._deepspeed.utils.safe_get_full_optimizer_state(parameter, moment)

    def _adam_step(self) -> Tensor:
        steps = {float(state["step"]) for state in self._optimizer.state.values() if "step" in state}
        if len(steps) > 1:
            raise RuntimeError(f"parameters disagree about the number of steps: {sorted(steps)}")
        return torch.tensor(steps.pop() if steps else 0.0)

    def prepare_states(self, **inputs: Any) -> None:
        """One step with learning rate 0: DeepSpeed's setters need optimizer state to write to."""
        was_training = self._engine.training
        self._engine.train()
        for _ in range(self._accumulation):
            self.backward(self.forward(**inputs).loss)
        applied = self.step(0.0)
        self._engine.train(was_training)
        if not applied:
            raise RuntimeError("gradients of the restored weights are not finite")

    @torch.no_grad()
    def set_state(self, name: str, state: dict[str, Tensor]) -> None:
        parameter = self._parameters[name]
        if not self._has_states:
            raise RuntimeError("prepare_states must run before set_state")
        if self._zero == 0:
            adam = self._optimizer.state[parameter]
            parameter.copy_(state["weight"])
            adam["exp_avg"].copy_(state["exp_avg"])
            adam["exp_avg_sq"].copy_(state["exp_avg_sq"])
        else:
            self._set_full(parameter, state.get("master", state["weight"]).float(), None)
            for moment in ("exp_avg", "exp_avg_sq"):
                self._set_full(parameter, state[moment], moment)
        for adam in self._optimizer.state.values():
            if "step" in adam:
                adam["step"].fill_(float(state["step"]))

    def _set_full(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        utils = self._deepspeed.utils
        value = value.to(self.model.device, copy=False)
        if self._zero < 3:
            if moment is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, moment)
            return
        # The full setter of ZeRO 3 runs past the end of tensors that do not divide: set this rank's part.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        start = size * self._groups.replicas.rank
        part = torch.zeros(size, dtype=value.dtype, device=value.device)
        mine = value.flatten()[start : start + size]
        part[: mine.numel()] = mine
        if moment is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, moment)

    @contextmanager
    def whole_model(self) -> Iterator[CogVideo]:
        if self._zero < 3:
            yield self.model
            return
        # Hooks gather ZeRO 3's parameters only inside `forward`; other uses get a plain copy.
        with torch.device("meta"):
            copy = CogVideo(self.model.config, tuple(self.model.plus), self._groups.tensor, kernels=self.model.kernels)  # type: ignore[arg-type]
        for name, _ in list(copy.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            weight = nn.Parameter(self.weight(name), requires_grad=False)
            setattr(copy.get_submodule(owner), leaf, weight)
        yield copy.eval()
