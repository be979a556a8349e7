"""The `watch` section: when a rank counts as dead or stuck, and what happens to numbers that are not right."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megacog.config.section import Section


class WatchConfig(Section):
    """Ranks that die or hang, steps that are not finite, loss spikes, silently changed weights."""

    enabled: bool = True
    """A process beside every rank that names dead and stuck ranks and ends the run with exit code 1 (Linux only)."""
    step_seconds: float = Field(default=300.0, gt=0)
    """A rank is stuck after so long in one phase of a step (data, forward, backward, optimizer) or in one batch of an
    evaluation while no rank is further behind."""
    start_seconds: float = Field(default=1800.0, gt=0)
    """The same for meeting, building and loading the model, and for the first time of each phase: kernels are compiled,
    caches filled."""
    slow_seconds: float = Field(default=3600.0, gt=0)
    """The same for a save, samples and the export."""
    lost_seconds: float = Field(default=8.0, ge=3)
    """A machine of which nothing is heard for so long is lost."""
    max_skipped_steps: int = Field(default=5, ge=1)
    """Steps in a row without a finite loss and gradient that end the run."""
    spike_window: int = Field(default=128, ge=8)
    """Steps over which mean and deviation of the loss are taken."""
    spike_sigma: float = Field(default=6.0, ge=0)
    """A loss so many deviations above the mean is a spike; 0 = none is."""
    on_spike: Literal["warn", "rollback"] = "warn"
    """rollback: continue from the newest checkpoint before the spike, with the samples since then left out."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Rollbacks of a run; at the next spike it ends."""
    compare_weights_every: int = Field(default=100, ge=0)
    """Steps between comparisons of the weights that data-parallel ranks hold alike; 0 = never."""
