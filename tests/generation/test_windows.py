"""Codes of far regions that are sampled in one step are those of one code at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from small_model import batch, build_model, model_config
from torch import Tensor

from megacog.config.schema import Stage
from megacog.generation.cache import stage_masks
from megacog.generation.clusters import Clusters
from megacog.generation.decode import generate_frames
from megacog.generation.sampling import row_generator, sample_clusters, sample_codes
from megacog.generation.schedule import schedule
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog_kernels.grid import MaskSpec, Space

WINDOW = {"kind": "shifted_window", "window": (2, 2)}
LOCAL = {"kind": "local3d", "window": (3, 3), "frames": 2}
SAMPLERS: dict[str, Any] = {
    "greedy": partial(sample_codes, top_k=1),
    "codes": partial(sample_codes, temperature=0.9, top_k=12, top_p=0.95),
    "clusters": partial(
        sample_clusters, clusters=Clusters.of_labels(torch.arange(17) % 5), top_clusters=4, cluster_temperature=0.9
    ),
}


def model_with(space: dict[str, Any]) -> CogVideo:
    config = model_config(
        num_layers=3, grid=(4, 4), num_frames=5, attention={"sequential": space, "interpolation": space}
    )
    return build_model(config).eval()


def both_ways(
    model: CogVideo, stage: Stage, guidance: float, sampler: str, plus: bool = True
) -> tuple[Tensor, Tensor, int]:
    """Codes in as few steps as can be, codes one at a time, and how many steps the first ones took."""
    layout = stage_layout(model.config, stage)
    text, valid, codes = batch(model.config, 5, size=3)
    null_text, null_valid, _ = batch(model.config, 5, size=1, seed=5)
    known = {frame: codes[:, frame] for frame in layout.given_frames}
    # A mask that hides nothing makes every code wait for all before it.
    alone = schedule((MaskSpec(layout.order, Space()),), layout.grid, frozenset(known))
    few = schedule(stage_masks(model, stage, plus), layout.grid, frozenset(known))
    assert len(alone.steps) == len(layout.loss_frames) * layout.grid.cells
    made = [
        generate_frames(
            model, stage, text, valid, (null_text, null_valid), known, guidance=guidance, choose=SAMPLERS[sampler],
            generators=[row_generator("row", row) for row in range(3)], steps=steps, plus=plus,
        )
        for steps in (None, alone)
    ]  # fmt: skip
    return made[0], made[1], len(few.steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("stage", ["sequential", "interpolation"])
def test_codes_do_not_depend_on_how_many_a_step_samples(stage: Stage, guidance: float, sampler: str) -> None:
    few, alone, steps = both_ways(model_with(WINDOW), stage, guidance, sampler)
    assert torch.equal(few, alone)
    assert steps == {"sequential": 34, "interpolation": 22}[stage]
    assert len(few.unique()) > 5  # a constant would prove nothing


def test_neither_do_those_of_local_attention_and_of_the_base_channel_alone() -> None:
    few, alone, steps = both_ways(model_with(LOCAL), "sequential", 3.0, "codes")
    assert torch.equal(few, alone) and steps < 40
    few, alone, steps = both_ways(model_with({"kind": "full"}), "sequential", 1.0, "codes", plus=False)
    assert torch.equal(few, alone) and steps == 16


def test_every_complete_frame_is_reported_once() -> None:
    model = model_with(WINDOW)
    text, valid, codes = batch(model.config, 5)
    reported: list[int] = []
    generate_frames(
        model, "sequential", text, valid, None, {0: codes[:, 0]}, guidance=1.0, choose=SAMPLERS["greedy"],
        generators=[row_generator("row", row) for row in range(2)], on_frame=reported.append,
    )  # fmt: skip
    assert reported == [2, 2, 2, 2]


def test_the_steps_heed_the_masks_of_both_channels_and_all_layers() -> None:
    model = model_with(WINDOW)
    layout = stage_layout(model.config, "interpolation")
    shifts = {mask.space.shift for mask in stage_masks(model, "interpolation") if mask.space.kind == "shifted_window"}
    assert shifts == {(0, 0), (1, 1)} and len(stage_masks(model, "interpolation")) == 3
    assert stage_masks(model, "interpolation", plus=False) == (layout.base_mask,)
    assert stage_masks(model, "base") == (stage_layout(model.config, "base").base_mask,)
