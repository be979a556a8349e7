"""The caches replay the training forward: every stage, mask and padding, at every position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import batch, build_model, model_config

from megacog.config.schema import Stage
from megacog.generation.cache import Decoder
from megacog.model.layout import stage_layout

SPACES: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "frame": {"kind": "frame"},
    "local3d": {"kind": "local3d", "window": (3, 3), "frames": 2},
    "shifted_window": {"kind": "shifted_window", "window": (2, 2)},
}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("stage", ["base", "sequential", "interpolation"])
@pytest.mark.parametrize("plus", [True, False], ids=["plus", "base only"])
def test_stepping_through_a_clip_gives_the_training_logits(stage: Stage, space: str, plus: bool) -> None:
    config = model_config(attention={"sequential": SPACES[space], "interpolation": SPACES[space]})
    model = build_model(config).eval()
    layout = stage_layout(config, stage)
    text, valid, codes = batch(config, layout.grid.frames)
    with torch.no_grad():
        logits = model.logits(text, valid, codes, stage, plus)[:, config.text_length :, : config.image_vocab_size]
    expected = logits.unflatten(1, (layout.grid.frames, layout.grid.cells))
    decoder = Decoder(model, stage, text, valid, plus)
    decoder.give({frame: codes[:, frame] for frame in layout.given_frames})
    for frame in layout.loss_frames:
        for cell in range(layout.grid.cells):
            token = torch.tensor([frame * layout.grid.cells + cell])
            previous = codes.flatten(1)[:, (token - 1).clamp_min(0)]
            step = decoder.step(token, previous)[:, 0]
            torch.testing.assert_close(step, expected[:, frame, cell], rtol=1e-4, atol=1e-4)
