"""Proof that a fresh attention-plus starts as the base: qkv and dense copied, positions tiled, gates half open.

Restricted to its own frame, every frame gets the base's own logits; with the default space (full) frame 0 does.

Tensor suffixes: B clips, T frames, P cells, V codes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megacog.checkpoint.export import load_tensors, open_export
from megacog.config.schema import AttentionConfig, PlusStage, SpaceConfig
from megacog.model.init import initialize_plus
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo

TOLERANCE = 1e-5
"""Largest difference, relative to the largest logit, that counts as equal in fp32."""


def fresh_model(path: Path, stage: PlusStage, own_frame: bool) -> CogVideo:
    """The export's base in fp32 with a fresh attention-plus that sees its own frame only, or all frames (`full`)."""
    export = open_export(path)
    space = SpaceConfig(kind="frame" if own_frame else "full")
    spaces = export.model.attention.model_dump() | {stage: space.model_dump()}
    config = export.model.model_copy(update={"attention": AttentionConfig.model_validate(spaces)})
    model = CogVideo(config, (stage,)).eval()
    load_tensors(model, export.tensor, [name for name, _ in model.named_parameters() if not name.startswith("plus.")])
    initialize_plus(model, stage, "copy", seed=0)
    return model


@torch.no_grad()
def difference(model: CogVideo, stage: PlusStage, frames: Sequence[int]) -> tuple[float, float]:
    """Largest difference of the frames' logits from the base's own: absolute, and over the largest base logit."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    text_BL = torch.randint(config.text_vocab_size, (4, config.text_length), generator=generator)
    valid_BL = torch.arange(config.text_length) >= torch.arange(4)[:, None]
    shape = (4, stage_layout(config, stage).grid.frames, config.cells)
    codes_BTP = torch.randint(config.image_vocab_size, shape, generator=generator)

    def frame_rows(logits: Tensor) -> Tensor:
        return logits[:, config.text_length :].unflatten(1, (-1, config.cells))

    video_BTPV = frame_rows(model.logits(text_BL, valid_BL, codes_BTP, stage))
    base_BTPV = torch.cat(
        [frame_rows(model.logits(text_BL, valid_BL, codes_BTP[:, frame, None], "base")) for frame in frames], dim=1
    )
    absolute = float((video_BTPV[:, list(frames)] - base_BTPV).abs().max())
    return absolute, absolute / float(base_BTPV.abs().max())


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prove.py fresh`; returns 0 if every difference is within 1e-5, else 1."""
    parser = argparse.ArgumentParser(prog="prove.py fresh", description=__doc__)
    parser.add_argument("export", type=Path, help="export folder")
    arguments = parser.parse_args(argv)
    failed = False
    print(f"{'stage':16}{'attention-plus sees':22}{'frames':>12}{'max |a-b|':>12}{'/ max |b|':>12}")
    stages: tuple[PlusStage, ...] = ("sequential", "interpolation")
    for stage in stages:
        for own_frame in (True, False):
            model = fresh_model(arguments.export, stage, own_frame)
            # Open frames of the interpolation order see each other, so only the sequential frame 0 stands alone.
            if not own_frame and stage == "interpolation":
                continue
            layout = stage_layout(model.config, stage)
            closed = [frame for frame in range(layout.grid.frames) if not layout.order.open[frame]]
            frames = closed if own_frame else [0]
            absolute, relative = difference(model, stage, frames)
            failed |= not relative <= TOLERANCE  # NaN fails
            seen = "its own frame" if own_frame else "all frames (full)"
            print(f"{stage:16}{seen:22}{','.join(map(str, frames)):>12}{absolute:12.2e}{relative:12.2e}")
    print("a fresh attention-plus differs from the base" if failed else f"all within {TOLERANCE:g}")
    return 1 if failed else 0
