"""Training of the frame tokenizer: pixel, temporal and optional perceptual loss, resumable.

A run is a function of its settings, videos and number of threads: the batch and learning rate of
a step depend on (seed, step) only, so a run that was stopped and continued ends with the same bits
as one that was not. The state of an unfinished run lies in `<out>.partial`.

Dimensions: B frames, H/W pixels.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from megacog.errors import ConfigError, DataError
from megacog.prepare.frame_pool import FramePool
from megacog.prepare.perceptual import PerceptualLoss
from megacog.runtime.files import FolderKind, atomic_directory
from megacog.runtime.log import get_logger
from megacog.runtime.signals import StopFlag
from megacog.runtime.tensor_files import save_tensors
from megacog.tokenizers.frames import ConvTokenizer, ConvTokenizerConfig, pixels_of_frames

STATE = FolderKind("state.json", "megacog-frame-tokenizer-training")
STATE_VERSION = 2
CODE_NORM_MOMENTUM = 0.05
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_SAVES = 60.0
_logger = get_logger(__name__)


@dataclass(frozen=True)
class FrameTraining:
    """How the tokenizer is trained. Everything here decides the result."""

    tokenizer: ConvTokenizerConfig = field(default_factory=ConvTokenizerConfig)
    steps: int = 800
    batch_size: int = 32
    """Frames per step: half of them random, the other half their neighbors in time."""
    learning_rate: float = 4e-3
    min_learning_rate_ratio: float = 0.02
    warmup_steps: int = 20
    weight_decay: float = 1e-4
    gradient_clip: float = 1.0
    temporal_weight: float = 0.5
    perceptual_weight: float = 0.1
    """Counts only with perceptual weights."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--steps must be at least 1, not {self.steps}")
        if self.batch_size < 2 or self.batch_size % 2:
            raise ConfigError(f"--batch must be an even number of frames (pairs in time), not {self.batch_size}")
        if not self.learning_rate > 0:
            raise ConfigError(f"--learning-rate must be positive, not {self.learning_rate}")


class FrameTrainer:
    """A tokenizer with its optimizer, step by step."""

    def __init__(
        self,
        settings: FrameTraining,
        pool: FramePool,
        perceptual: PerceptualLoss | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.settings, self.pool, self.perceptual = settings, pool, perceptual
        self.device = torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            tokenizer = ConvTokenizer(settings.tokenizer)
        _start_at_median(tokenizer, pool)
        self.tokenizer = tokenizer.to(self.device).train()
        self.tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters = dict(self.tokenizer.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.step_number = 0

    def step(self) -> dict[str, float]:
        """Returns the losses and PSNR (dB) of one optimizer step."""
        settings = self.settings
        generator = torch.Generator().manual_seed(_mix(settings.seed, self.step_number))
        frames_BHWC = self.pool.pairs(settings.batch_size // 2, generator).to(self.device)
        # An average over all batches so far, then over the last few: the untrained start must not linger.
        self.tokenizer.code_norm.momentum = max(CODE_NORM_MOMENTUM, 1 / (self.step_number + 1))
        pixels_BCHW = pixels_of_frames(frames_BHWC).contiguous(memory_format=torch.channels_last)
        output_BCHW, quantized, z_BDhw = self.tokenizer(pixels_BCHW)
        losses = self._losses(output_BCHW, pixels_BCHW)
        losses["commitment"] = quantized.commitment
        loss = torch.stack(list(losses.values())).sum()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.step_number)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.gradient_clip)
        self.optimizer.step()
        self.tokenizer.quantizer.update(z_BDhw, quantized.codes_Bhw, generator)
        self.step_number += 1
        error = (output_BCHW.detach().clamp(-1, 1) - pixels_BCHW).square().mean().item() / 4
        values = {name: value.item() for name, value in losses.items()}
        return {"loss": loss.item(), **values, "psnr": psnr(error)}

    def _losses(self, output_BCHW: Tensor, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        first, second = (output_BCHW - pixels_BCHW).chunk(2)
        losses = {
            "pixel": (output_BCHW - pixels_BCHW).abs().mean(),
            # Predicted minus real difference of adjacent frames = difference of their errors.
            "temporal": self.settings.temporal_weight * (second - first).abs().mean(),
        }
        if self.perceptual is not None:
            losses["perceptual"] = self.settings.perceptual_weight * self.perceptual(output_BCHW, pixels_BCHW)
        return losses

    def state(self) -> dict[str, Tensor]:
        """Returns everything that the next step depends on, besides settings and videos."""
        tensors = {f"model.{name}": value for name, value in self.tokenizer.state_dict().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def load_state(self, tensors: dict[str, Tensor], step_number: int) -> None:
        """Continues from what `state` returned after `step_number` steps."""
        model = {name[len("model.") :]: value for name, value in tensors.items() if name.startswith("model.")}
        self.tokenizer.load_state_dict(model)
        moments: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                parameter, key = name[len("optimizer.") :].rsplit(".", 1)
                like = self.parameters.get(parameter)
                if like is not None and like.shape == value.shape:
                    # The fused optimizer walks weight and moments side by side: same memory format.
                    value = torch.empty_like(like).copy_(value)
                moments.setdefault(parameter, {})[key] = value
        stored = self.optimizer.state_dict()
        stored["state"] = {index: moments[name] for index, name in enumerate(self.parameters) if name in moments}
        self.optimizer.load_state_dict(stored)
        self.step_number = step_number


@torch.no_grad()
def _start_at_median(tokenizer: ConvTokenizer, pool: FramePool) -> None:
    """Lets an untrained decoder paint the median color, so that no step is spent on learning it."""
    sample_NC = pool.frames_NHWC[:: max(1, len(pool) // 64)].reshape(-1, 3).float()
    output = tokenizer.decoder[-1]
    assert isinstance(output, torch.nn.Conv2d) and output.bias is not None
    output.bias.copy_(sample_NC.median(0).values / 127.5 - 1.0)


def learning_rate(settings: FrameTraining, step: int) -> float:
    """Returns the learning rate of a step: linear warm-up, then a cosine down to its minimum."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    low = settings.min_learning_rate_ratio
    return settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def psnr(mean_squared_error: float) -> float:
    """Returns the peak signal-to-noise ratio in dB of an error on a scale of 0..1; at most 100."""
    return -10 * math.log10(max(mean_squared_error, 1e-10))


def run_training(trainer: FrameTrainer, out: Path, identity: dict[str, Any]) -> None:
    """Trains to the last step, continuing an earlier run of the same identity if there is one.

    Args:
        trainer: at step 0.
        out: final folder; the state of an unfinished run goes to `<out>.partial`.
        identity: settings and inputs that an earlier run must share, JSON values.

    Raises:
        KeyboardInterrupt: a signal asked to stop; the state is saved.
        ConfigError: the unfinished run had other settings.
    """
    partial = partial_path(out)
    if partial.exists():
        _resume(trainer, partial, identity)
        _logger.info("continuing %s at step %d", partial, trainer.step_number)
    start = last_line = last_save = time.monotonic()
    first_step = trainer.step_number
    steps = trainer.settings.steps
    with StopFlag() as stop:
        while trainer.step_number < steps:
            values = trainer.step()
            if not math.isfinite(values["loss"]):
                raise DataError(
                    f"the loss is {values['loss']} at step {trainer.step_number}; try a lower --learning-rate"
                )
            now = time.monotonic()
            if now - last_line >= _SECONDS_BETWEEN_LINES or trainer.step_number == steps:
                last_line = now
                _log_line(values, trainer, (trainer.step_number - first_step) / (now - start))
            if now - last_save >= _SECONDS_BETWEEN_SAVES or (stop.requested and trainer.step_number < steps):
                last_save = now
                _save(trainer, partial, identity)
            if stop.requested and trainer.step_number < steps:
                _logger.info(
                    "stopped by %s at step %d; the same command continues", stop.signal_name, trainer.step_number
                )
                raise KeyboardInterrupt


def partial_path(out: Path) -> Path:
    """Returns where the state of an unfinished run into `out` lies."""
    return out.with_name(out.name + ".partial")


def remove_partial(out: Path) -> None:
    """Removes the state of an unfinished run, if there is one."""
    if partial_path(out).exists():
        shutil.rmtree(partial_path(out))


def training_identity(settings: FrameTraining) -> dict[str, Any]:
    """Returns the settings as JSON values."""
    return json.loads(json.dumps(asdict(settings)))


def _log_line(values: dict[str, float], trainer: FrameTrainer, steps_per_second: float) -> None:
    step, steps = trainer.step_number, trainer.settings.steps
    parts = " ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "psnr" and value)
    _logger.info(
        "step %d/%d  %s  PSNR %.1f dB  lr %.1e  %.1f steps/s  %.0f s left",
        step,
        steps,
        parts,
        values["psnr"],
        learning_rate(trainer.settings, step - 1),
        steps_per_second,
        (steps - step) / steps_per_second,
    )


def _save(trainer: FrameTrainer, partial: Path, identity: dict[str, Any]) -> None:
    with atomic_directory(partial, STATE) as folder:
        save_tensors(trainer.state(), folder / "state.safetensors")
        fields = {"format": STATE.format, "version": STATE_VERSION, "step": trainer.step_number, "identity": identity}
        (folder / STATE.file).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def _resume(trainer: FrameTrainer, partial: Path, identity: dict[str, Any]) -> None:
    advice = "pass --restart to start over"
    try:
        fields = json.loads((partial / STATE.file).read_text(encoding="utf-8"))
        version, step, earlier = fields["version"], fields["step"], fields["identity"]
        tensors = safetensors.torch.load_file(partial / "state.safetensors")
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise DataError(f"{partial}: the unfinished run cannot be read ({error}); {advice}") from error
    if version != STATE_VERSION or not isinstance(earlier, dict):
        raise DataError(f"{partial}: state version {version}, expected {STATE_VERSION}; {advice}")
    changed = sorted(key for key in {*earlier, *identity} if earlier.get(key) != identity.get(key))
    if changed:
        shown = "; ".join(f"{key}: {earlier.get(key)!r} -> {identity.get(key)!r}" for key in changed)
        raise ConfigError(f"{partial}: the unfinished run had other settings ({shown}); repeat them, or {advice}")
    try:
        trainer.load_state(tensors, step)
    except (RuntimeError, KeyError, ValueError) as error:
        raise DataError(f"{partial}: the unfinished run's state is damaged ({error}); {advice}") from error


def _mix(seed: int, step: int) -> int:
    """Returns a 63-bit generator seed; neighboring (seed, step) give unrelated streams."""
    value = (seed * 0x9E3779B97F4A7C15 + step + 1) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (value ^ (value >> 31)) >> 1
