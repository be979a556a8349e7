"""A tiny run for programs that measure, and a made-up measurement."""

from __future__ import annotations

from megacog.metrics.profile import KINDS, StepProfile
from megacog.model.flops import Work
from megacog.training.measure import Case, Measured

TINY = (
    "model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "model.grid=[2,3]", "model.num_frames=3",
    "model.text_length=4",
)  # fmt: skip
PROFILE = StepProfile({kind: 0.2 for kind in KINDS} | {"head": 0.01}, 0.0, 1.0, (("kernel", 0.2),))
MEASURED = Measured(Case("sequential", 8), Work(frozen=60 * 10**12), 1.0, 10, 9.9, 100 * 2**30, 16_000.0, PROFILE)
