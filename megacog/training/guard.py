"""What happens when numbers are not right: non-finite steps are skipped, spikes told, their samples dumped.

And no checkpoint is made of weights that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacog.config.schema import WatchConfig
from megacog.errors import MegacogError
from megacog.runtime.files import write_json
from megacog.runtime.log import SHARED, get_logger
from megacog.training.spikes import Spikes

log = get_logger(__name__)

FOLDER = "bad_steps"
"""Of the run: what was dumped."""
_MOST_DUMPS = 100
"""Of one process: a run that skips steps for ever must not fill the disk."""


class NonFiniteError(MegacogError):
    """Loss or gradients were not finite for several steps in a row, or weights are not."""


@dataclass(frozen=True)
class MicroBatch:
    """What this rank has computed of one micro batch.

    Attributes:
        sample_ids: Its samples.
        losses: float32 [1 + Q]: mean loss, then that of each predicted frame; on the device.
    """

    sample_ids: Sequence[str]
    losses: Tensor


class Guard:
    """Judges finished steps; the same losses reach every rank, so all ranks stop together.

    Args:
        config: Limits.
        run_dir: Where samples of bad steps are dumped.
        rank: For the dump's name.
    """

    def __init__(self, config: WatchConfig, run_dir: Path, rank: int) -> None:
        self.consecutive = 0
        """Skipped steps in a row."""
        self.skipped = 0
        """Skipped steps of the run."""
        self.spiked = 0
        """Spikes of the run."""
        self._config = config
        self._folder = run_dir / FOLDER
        self._rank = rank
        self._spikes = Spikes(config.spike_window, config.spike_sigma)
        self._dumps = 0

    def check(
        self, step: int, loss: float, grad_norm: float, applied: bool, batches: Sequence[MicroBatch]
    ) -> float | None:
        """Accept a finished step.

        Args:
            step: Optimizer step, from 1.
            loss: Mean over all ranks.
            grad_norm: Before clipping; not finite when the engine skipped the step.
            applied: Whether the engine changed the weights.
            batches: Of this rank.

        Returns:
            If the loss is a spike, how many deviations it is above the mean.

        Raises:
            NonFiniteError: Too many steps in a row were skipped, or a non-finite one was applied.
        """
        if not (applied and math.isfinite(loss) and math.isfinite(grad_norm)):
            self._not_finite(step, loss, grad_norm, applied, batches)
            return None
        self.consecutive = 0
        score = self._spikes.score(loss)
        if score is not None:
            self.spiked += 1
            where = self._dump(step, f"loss {loss}, {score:.1f} deviations above the mean", batches)
            log.warning(
                "step %d: loss %.4f is %.1f deviations above the mean of the %d steps before; this rank's samples: %s",
                step, loss, score, self._config.spike_window, where, extra=SHARED,
            )  # fmt: skip
        return score

    def _not_finite(
        self, step: int, loss: float, grad_norm: float, applied: bool, batches: Sequence[MicroBatch]
    ) -> None:
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        # Where losses are finite and gradients are not, it may have been any rank's samples.
        suspects = batches if math.isfinite(loss) else [one for one in batches if not bool(one.losses.isfinite().all())]
        where = self._dump(step, what, suspects) if suspects else "not those of this rank"
        what += f"; samples: {where}"
        if applied:
            raise NonFiniteError(f"{what}. The step was applied, the weights are spoiled: resume a checkpoint.")
        self.consecutive += 1
        self.skipped += 1
        culprit = bool(suspects) and not math.isfinite(loss)
        log.warning(
            "%s. Step skipped (%d in a row, %d in all).", what, self.consecutive, self.skipped,
            extra=None if culprit else SHARED,
        )  # fmt: skip
        if self.consecutive >= self._config.max_skipped_steps:
            raise NonFiniteError(
                f"{what}. {self.consecutive} steps in a row were not finite; stopped. Lower train.learning_rate or "
                "train.gradient_clip, try train.precision fp32, or look at these samples; then resume."
            )

    def _dump(self, step: int, why: str, batches: Sequence[MicroBatch]) -> str:
        """Write down the samples of this rank; where they are, or the ids themselves."""
        ids = ", ".join(sample for batch in batches for sample in batch.sample_ids)
        self._dumps += 1
        if self._dumps > _MOST_DUMPS:
            return ids
        path = self._folder / f"step-{step:07d}-rank-{self._rank}.json"
        content = {
            "step": step, "rank": self._rank, "why": why,
            "micro_batches": [
                {"sample_ids": list(batch.sample_ids), "loss": numbers[0], "frame_loss": numbers[1:]}
                for batch, numbers in zip(batches, _numbers(batches), strict=True)
            ],
        }  # fmt: skip
        try:
            write_json(path, content)
        except (OSError, MegacogError) as error:
            log.warning("%s could not be written: %s", path, error)
        return f"{ids} (losses in {path})"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in JSON's types; the same on all ranks."""
        return {"skipped": self.skipped, "spiked": self.spiked, "losses": list(self._spikes.losses)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; that of a checkpoint without one is empty."""
        self.skipped, self.spiked = int(state.get("skipped", 0)), int(state.get("spiked", 0))
        self._spikes.restore(state.get("losses", []))


def require_finite_weights(model: nn.Module, step: int) -> None:
    """Check before a checkpoint that all trained weights are finite. Collective; ZeRO 3 leaves nothing to look at.

    Raises:
        NonFiniteError: On all ranks; those whose own weights are not finite name the tensors.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad and weight.numel()}
    if not trained:
        return
    spoiled_K = ~torch.stack([torch.stack(weight.detach().aminmax()).isfinite().all() for weight in trained.values()])
    count = spoiled_K.sum()
    if dist.is_initialized():
        dist.all_reduce(count)
    if count == 0:
        return
    names = [name for name, spoiled in zip(trained, spoiled_K.tolist(), strict=True) if spoiled]
    raise NonFiniteError(
        f"step {step}: trained weights are not finite: {', '.join(names[:3]) or 'those of another rank'}. No "
        "checkpoint is made of them: resume the one before, with a lower train.learning_rate or train.gradient_clip"
    )


def _numbers(batches: Sequence[MicroBatch]) -> list[list[float | str]]:
    """Losses as JSON can hold them: what is not finite as text."""
    rows = torch.stack([batch.losses for batch in batches]).tolist()
    return [[number if math.isfinite(number) else str(number) for number in row] for row in rows]
