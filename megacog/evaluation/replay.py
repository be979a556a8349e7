"""Proof that generation computes what training computes: a clip replayed through the caches.

A clip is sampled, then its codes are fed through the decode cache cell by cell, and every logit is
compared with the training forward over the whole clip: plain and guided, every stage of the export.

Tensor suffixes: B clips, L text length, T frames, P cells, V codes, R rows (captions, then null texts).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacog.checkpoint.export import load_model, open_export
from megacog.config.schema import Stage
from megacog.evaluation.evaluate import tasks
from megacog.generation.cache import Decoder
from megacog.generation.decode import generate_frames
from megacog.generation.sampling import guide, row_generator, sample_codes
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog.runtime import log
from megacog.tokenizers.text import TextTokenizer

TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit, that counts as equal in fp32."""


@dataclass(frozen=True)
class Difference:
    """Between the logits of the caches and those of the training forward."""

    positions: int
    absolute: float
    relative: float
    """max |a - b| / max |b|."""


def replayed_logits(
    model: CogVideo, stage: Stage, text_RL: Tensor, valid_RL: Tensor, codes_RTP: Tensor, stepped: Sequence[int]
) -> Tensor:
    """Logits [R, len(stepped), P, V] of the frames `stepped`, cell by cell; the other frames are given whole."""
    layout = stage_layout(model.config, stage)
    decoder = Decoder(model, stage, text_RL, valid_RL)
    given = {frame: codes_RTP[:, frame] for frame in range(layout.grid.frames) if frame not in stepped}
    if given:
        decoder.give(given)
    codes_RF = codes_RTP.flatten(1)
    tokens = [frame * layout.grid.cells + cell for frame in stepped for cell in range(layout.grid.cells)]
    steps = [decoder.step(torch.tensor([token]), codes_RF[:, max(token - 1, 0), None]) for token in tokens]
    return torch.cat(steps, dim=1).unflatten(1, (len(stepped), layout.grid.cells))


def compare(
    model: CogVideo, stage: Stage, text: tuple[Tensor, Tensor], null: tuple[Tensor, Tensor], guidance: float
) -> Difference:
    """Sample clips of the stage with the cache, then replay them; every frame that can be is stepped through."""
    layout = stage_layout(model.config, stage)
    B, given = text[0].shape[0], [frame for frame, is_open in enumerate(layout.order.open) if is_open]
    noise = torch.Generator().manual_seed(11)
    shape = (B, model.config.cells)
    known = {frame: torch.randint(model.config.image_vocab_size, shape, generator=noise) for frame in given}
    codes_BTP = generate_frames(
        model, stage, *text, null, known, guidance=guidance, choose=sample_codes,
        generators=[row_generator("replay", stage, row) for row in range(B)],
    )  # fmt: skip
    stepped = [frame for frame in range(layout.grid.frames) if frame not in given]
    text_RL, valid_RL = (torch.cat([both, none]) for both, none in zip(text, null, strict=True))
    codes_RTP = torch.cat([codes_BTP, codes_BTP])
    with torch.no_grad():
        cached = replayed_logits(model, stage, text_RL, valid_RL, codes_RTP, stepped)
        whole = model.logits(text_RL, valid_RL, codes_RTP, stage)
    L, V = model.config.text_length, model.config.image_vocab_size
    trained = whole[:, L:, :V].unflatten(1, (layout.grid.frames, layout.grid.cells))[:, stepped]
    cached, trained = (guide(logits[:B], logits[B:], guidance) for logits in (cached, trained))
    absolute = float((cached - trained).abs().max())
    return Difference(B * len(stepped) * model.config.cells, absolute, absolute / float(trained.abs().max()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prove.py replay`; returns 0 if every difference is within 1e-4, else 1."""
    parser = argparse.ArgumentParser(prog="prove.py replay", description=__doc__)
    parser.add_argument("export", type=Path, help="export folder")
    parser.add_argument("--clips", type=int, default=4, help="clips per stage (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="scale of the guided case (default: %(default)s)")
    arguments = parser.parse_args(argv)
    log.setup()
    export = open_export(arguments.export)
    model = load_model(export.path, dtype=torch.float32)
    tokenizer = TextTokenizer.load(export.text_tokenizer)
    captions = [task.caption for task in tasks(arguments.clips, 0)]
    num_frames = model.config.num_frames
    stages: tuple[Stage, ...] = ("base", *export.plus)
    failed = False
    print(f"{'stage':16}{'guidance':>9}{'positions':>11}{'max |a-b|':>12}{'/ max |b|':>12}")
    for stage in stages:
        span = None if stage == "base" else 4.0 if stage == "sequential" else 2.0
        text, null = (
            tokenizer.pad(ids, model.config.text_length)
            for ids in (
                [tokenizer.encode(caption, span, num_frames) for caption in captions],
                [tokenizer.encode_null(span, num_frames)] * len(captions),
            )
        )
        for guidance in (1.0, arguments.guidance):
            found = compare(model, stage, text, null, guidance)
            failed |= not found.relative <= TOLERANCE  # NaN fails
            print(f"{stage:16}{guidance:9g}{found.positions:11d}{found.absolute:12.2e}{found.relative:12.2e}")
    print("the caches differ from the training forward" if failed else f"all within {TOLERANCE:g}")
    return 1 if failed else 0
