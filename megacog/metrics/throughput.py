"""How fast a run trains: tokens/s, TFLOP/s, model FLOP utilization, and time lost waiting for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class StepSpeed:
    """Speed of one optimizer step; the field names are the log keys."""

    seconds: float
    tokens_per_second: float
    """Of all ranks together."""
    tflops: float
    """Model TFLOP/s of one device; recomputation does not count."""
    hardware_tflops: float
    """TFLOP/s of one device with recomputed activations."""
    mfu: float | None
    """tflops / peak of the device, 0 to 1; None when the peak is not known."""
    hfu: float | None
    """hardware_tflops / peak of the device; None when the peak is not known."""
    data_wait: float
    """Share of the step spent waiting for data, 0 to 1."""


class Throughput:
    """Stopwatch of optimizer steps.

    Args:
        model_flops: of one sample, forward and backward.
        hardware_flops: the same with recomputed activations.
        tokens_per_sample: tokens of one sample.
        world_size: devices that share the work, tensor-parallel ones included.
        peak_tflops: dense peak of one device, None if unknown.
        clock: seconds that only go up.
    """

    def __init__(
        self,
        model_flops: int,
        hardware_flops: int,
        tokens_per_sample: int,
        world_size: int,
        peak_tflops: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model_flops = model_flops
        self._hardware_flops = hardware_flops
        self._tokens_per_sample = tokens_per_sample
        self._world_size = world_size
        self._peak_tflops = peak_tflops
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Start the step's clock anew, e.g. after an evaluation or a checkpoint."""
        self._start = self._clock()
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    def step(self, num_samples: int) -> StepSpeed:
        """Return the speed since the last `step` or `restart`, and start the next step.

        Args:
            num_samples: samples of this step over all ranks.
        """
        seconds = max(self._clock() - self._start, 1e-9)
        samples_per_second = num_samples / seconds / self._world_size
        tflops, hardware_tflops = (
            flops * samples_per_second / 1e12 for flops in (self._model_flops, self._hardware_flops)
        )
        speed = StepSpeed(
            seconds=seconds,
            tokens_per_second=num_samples * self._tokens_per_sample / seconds,
            tflops=tflops,
            hardware_tflops=hardware_tflops,
            mfu=None if self._peak_tflops is None else tflops / self._peak_tflops,
            hfu=None if self._peak_tflops is None else hardware_tflops / self._peak_tflops,
            data_wait=min(self._waited / seconds, 1.0),
        )
        self.restart()
        return speed
