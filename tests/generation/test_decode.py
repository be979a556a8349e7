"""Frames sampled with the cache are the frames that the full forward gives, for every stage and mask."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from small_model import batch, build_model, model_config
from torch import Tensor

from megacog.config.schema import Stage
from megacog.generation.decode import generate_frames
from megacog.generation.sampling import row_generator, sample_codes
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo

SPACES: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "frame": {"kind": "frame"},
    "local3d": {"kind": "local3d", "window": (3, 3), "frames": 2},
    "shifted_window": {"kind": "shifted_window", "window": (2, 2)},
}
GREEDY: dict[str, Any] = {"choose": partial(sample_codes, top_k=1)}


def generators(count: int) -> list[torch.Generator]:
    return [row_generator("row", row) for row in range(count)]


def uncached_greedy(
    model: CogVideo, stage: Stage, text: Tensor, valid: Tensor, codes_BTP: Tensor, unknown: list[int], plus: bool
) -> Tensor:
    """Argmax loop over whole forwards of the training model."""
    codes_BTP = codes_BTP.clone()
    L, P, V = model.config.text_length, model.config.cells, model.config.image_vocab_size
    for frame in unknown:
        for cell in range(P):
            with torch.no_grad():
                logits = model.logits(text, valid, codes_BTP, stage, plus)
            codes_BTP[:, frame, cell] = logits[:, L + frame * P + cell, :V].argmax(-1)
    return codes_BTP


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("stage", ["base", "sequential", "interpolation"])
def test_cached_generation_gives_the_same_greedy_codes_as_whole_forwards(stage: Stage, space: str) -> None:
    config = model_config(num_layers=3, attention={"sequential": SPACES[space], "interpolation": SPACES[space]})
    model = build_model(config).eval()
    layout = stage_layout(config, stage)
    text, valid, codes = batch(config, layout.grid.frames)
    known = {frame: codes[:, frame] for frame in layout.given_frames}
    start = codes.clone()
    start[:, list(layout.loss_frames)] = 0
    expected = uncached_greedy(model, stage, text, valid, start, list(layout.loss_frames), plus=True)
    made = generate_frames(
        model, stage, text, valid, None, known, guidance=1.0, generators=generators(2), **GREEDY
    )
    assert torch.equal(made, expected)
    assert len(expected[:, list(layout.loss_frames)].unique()) > 3  # a constant would prove nothing


def test_without_the_plus_channel_the_base_decides() -> None:
    config = model_config()
    model = build_model(config).eval()
    text, valid, codes = batch(config, 5)
    start = codes.clone()
    start[:, 1:] = 0
    expected = uncached_greedy(model, "sequential", text, valid, start, [1, 2, 3, 4], plus=False)
    made = generate_frames(
        model, "sequential", text, valid, None, {0: codes[:, 0]}, guidance=1.0, plus=False,
        generators=generators(2), **GREEDY,
    )  # fmt: skip
    assert torch.equal(made, expected)


def test_guidance_combines_the_logits_of_both_texts() -> None:
    config = model_config(num_frames=3)
    model = build_model(config).eval()
    text, valid, codes = batch(config, 3)
    null_text, null_valid, _ = batch(config, 3, size=1, seed=5)
    codes[:, 1:] = 0
    L, P, V = config.text_length, config.cells, config.image_vocab_size
    expected = codes.clone()
    for frame in (1, 2):
        for cell in range(P):
            with torch.no_grad():
                caption = model.logits(text, valid, expected, "sequential")
                null = model.logits(null_text.expand_as(text), null_valid.expand_as(valid), expected, "sequential")
            logits = (null + 2.5 * (caption - null))[:, L + frame * P + cell, :V]
            expected[:, frame, cell] = logits.argmax(-1)
    made = generate_frames(
        model, "sequential", text, valid, (null_text, null_valid), {0: codes[:, 0]}, guidance=2.5,
        generators=generators(2), **GREEDY,
    )  # fmt: skip
    assert torch.equal(made, expected)
    with pytest.raises(ValueError, match="needs null_text"):
        generate_frames(
            model, "sequential", text, valid, None, {}, guidance=2.5, generators=generators(2), **GREEDY
        )


def test_a_row_is_sampled_alike_alone_and_in_a_batch() -> None:
    config = model_config()
    model = build_model(config).eval()
    text, valid, codes = batch(config, 5, size=4)
    sampling: dict[str, Any] = {"guidance": 1.0, "choose": partial(sample_codes, top_p=0.95)}
    together = generate_frames(
        model, "sequential", text, valid, None, {0: codes[:, 0]}, generators=generators(4), **sampling
    )
    alone = generate_frames(
        model, "sequential", text[2:3], valid[2:3], None, {0: codes[2:3, 0]}, generators=generators(4)[2:3], **sampling
    )
    assert torch.equal(together[2:3], alone)
    assert not torch.equal(together[2, 1:], together[3, 1:])


def test_sampling_leaves_training_mode_and_the_global_random_state_alone() -> None:
    config = model_config(mlp_dropout=0.5)
    model = build_model(config).train()
    text, valid, _ = batch(config, 1)
    before = torch.get_rng_state()
    made = [
        generate_frames(model, "base", text, valid, None, {}, guidance=1.0, generators=generators(2), **GREEDY)
        for _ in range(2)
    ]
    assert model.training
    assert torch.equal(made[0], made[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_several_given_frames_start_a_sequence() -> None:
    config = model_config()
    model = build_model(config).eval()
    text, valid, codes = batch(config, 5)
    known = {0: codes[:, 0], 1: codes[:, 1], 2: codes[:, 2]}
    start = codes.clone()
    start[:, 3:] = 0
    sampled_rows = []
    made = generate_frames(
        model, "sequential", text, valid, None, known, guidance=1.0, generators=generators(2),
        on_frame=sampled_rows.append, **GREEDY,
    )  # fmt: skip
    assert torch.equal(made, uncached_greedy(model, "sequential", text, valid, start, [3, 4], plus=True))
    assert sampled_rows == [2, 2]


def test_known_frames_outside_the_sequence_are_refused() -> None:
    config = model_config()
    text, valid, codes = batch(config, 5)
    with pytest.raises(ValueError, match=r"known frames \[7\]"):
        generate_frames(
            build_model(config).eval(), "sequential", text, valid, None, {7: codes[:, 0]}, guidance=1.0,
            generators=generators(2), **GREEDY,
        )  # fmt: skip
