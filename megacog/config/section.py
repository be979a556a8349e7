"""What all groups of settings share, and the names of choices."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Stage = Literal["base", "sequential", "interpolation"]
PlusStage = Literal["sequential", "interpolation"]
BasePrecision = Literal["fp8"]
Kernels = Literal["auto", "triton", "reference"]
Checkpointing = Literal["none", "selective", "full"]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
