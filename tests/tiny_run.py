"""The tiny training run of `launch/soak.py`, for tests."""

from __future__ import annotations

from megacog.training.soak_inputs import CAPTIONS, CODEBOOK, GRID, make_inputs, settings, write_config

__all__ = ["CAPTIONS", "CODEBOOK", "GRID", "make_inputs", "settings", "write_config"]
