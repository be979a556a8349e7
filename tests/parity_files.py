"""Small parity files, made by the plain step-by-step model: any stage, window, size and padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sat_files import original_weights

from megacog.config.schema import ModelConfig, PlusStage
from megacog.interop.parity_writing import write_parity_file


def parity_model(window: int = -1, stage: PlusStage = "sequential", **changes: Any) -> ModelConfig:
    """Two layers, width 24, 4 heads on an 8 x 8 grid; window -1 = full attention."""
    space = {"kind": "shifted_window", "window": (window, window)} if window > 0 else {"kind": "full"}
    settings: dict[str, Any] = dict(
        num_layers=2, hidden_size=24, num_heads=4, grid=(8, 8), text_length=10, image_vocab_size=30,
        text_vocab_size=14, boi_id=12, base_positions=600, plus_positions=330, attention={stage: space},
    )  # fmt: skip
    return ModelConfig.model_validate(settings | changes)


def small_parity_file(path: Path, model: ModelConfig, stage: PlusStage, padding: tuple[int, ...] = (0, 4)) -> Path:
    """A file with weights far from the start of training; returns its path."""
    weights = original_weights(model, stage, dtype=torch.float32, std=0.1)
    write_parity_file(path, model, stage, padding, weights)
    return path
