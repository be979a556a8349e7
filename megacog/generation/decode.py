"""Sampling the unknown frames of one sequence with the decode cache, in the order of the stage.

Tensor suffixes: B clips, L text length, T frames, P cells of a frame, V codes, R rows of the cache
(B, or 2 B with guidance: captioned rows first, null rows after them).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megacog.config.schema import Stage
from megacog.generation.cache import Decoder
from megacog.generation.sampling import Choose, draw_uniforms, guide
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog_kernels.grid import Order


def frame_levels(order: Order, known: Container[int]) -> list[list[int]]:
    """Frames in the order in which they enter the cache: one list per level, lowest first, each in time.

    Raises:
        ValueError: an unknown frame is open: its cells would have to see later ones.
    """
    num_frames = len(order.level)
    blind = [frame for frame in range(num_frames) if order.open[frame] and frame not in known]
    if blind:
        raise ValueError(f"frames {blind} are open in this stage and must be given, they cannot be sampled")
    return [[frame for frame in range(num_frames) if order.level[frame] == level] for level in sorted(set(order.level))]


@contextmanager
def _sampling_mode(model: CogVideo) -> Iterator[None]:
    """Dropout off and no gradients, whatever the caller was doing; the mode is put back afterwards.

    no_grad, not inference_mode: tensors that the model caches here may be used in training later.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def generate_frames(
    model: CogVideo,
    stage: Stage,
    text_BL: Tensor,
    text_valid_BL: Tensor,
    null_text: tuple[Tensor, Tensor] | None,
    known: Mapping[int, Tensor],
    *,
    guidance: float,
    choose: Choose,
    generators: Sequence[torch.Generator],
    text_bias: float = 0.0,
    plus: bool = True,
    on_frame: Callable[[int], None] | None = None,
) -> Tensor:
    """The codes of all frames of the stage's sequence, int64 [B, T, P]; known frames are returned as given.

    Args:
        text_BL: text pieces, left padded; `text_valid_BL` is False on the padding.
        null_text: pieces and validity of the null text, [B, L] each or one row for all; needed when guidance != 1.
        known: codes [B, P] by frame index. In `interpolation` all even frames must be known.
        guidance: scale of classifier-free guidance; 1 runs no null rows.
        choose: draws codes from (guided) logits, see `sampling.chooser`.
        generators: one per row, on the CPU; each draws (unknown frames x cells) numbers.
        text_bias: added to the attention scores of text keys in every frame row.
        plus: False switches the attention-plus channel off.
        on_frame: called with B after each sampled frame.
    """
    num_clips = text_BL.shape[0]
    if len(generators) != num_clips:
        raise ValueError(f"{len(generators)} generators for {num_clips} clips")
    if guidance != 1.0 and null_text is None:
        raise ValueError(f"guidance {guidance} needs null_text")
    layout = stage_layout(model.config, stage)
    frames, cells = layout.grid.frames, layout.grid.cells
    outside = sorted(frame for frame in known if not 0 <= frame < frames)
    if outside:
        raise ValueError(f"known frames {outside} are outside a sequence of {frames} frames")
    levels = frame_levels(layout.order, known)
    device = model.device
    guided = guidance != 1.0 and null_text is not None

    text_RL, valid_RL = text_BL, text_valid_BL
    if guided:
        assert null_text is not None
        text_RL = torch.cat([text_BL, null_text[0].expand_as(text_BL)])
        valid_RL = torch.cat([text_valid_BL, null_text[1].expand_as(text_valid_BL)])
    uniform_BUP = draw_uniforms(generators, (frames - len(known)) * cells).view(num_clips, -1, cells).to(device)
    uniforms = iter(uniform_BUP.unbind(1))

    def both_streams(codes: Tensor) -> Tensor:
        return torch.cat([codes, codes]) if guided else codes

    def guided_logits(logits_RV: Tensor) -> Tensor:
        if not guided:
            return logits_RV
        conditional_BV, null_BV = logits_RV.chunk(2)
        return guide(conditional_BV, null_BV, guidance)

    codes_BTP = torch.empty(num_clips, frames, cells, dtype=torch.int64, device=device)
    for frame, codes_BP in known.items():
        codes_BTP[:, frame] = codes_BP.to(device)
    with _sampling_mode(model):
        decoder = Decoder(model, stage, text_RL.to(device), valid_RL.to(device), plus=plus, text_bias=text_bias)
        for level in levels:
            given = [frame for frame in level if frame in known]
            if given:
                decoder.give({frame: both_streams(codes_BTP[:, frame]) for frame in given})
            for frame in level:
                if frame in known:
                    continue
                uniform_BP = next(uniforms)
                previous_R = None
                for cell in range(cells):
                    logits_BV = guided_logits(decoder.step(frame, cell, previous_R))
                    code_B = choose(logits_BV, uniform_BP[:, cell])
                    codes_BTP[:, frame, cell] = code_B
                    previous_R = both_streams(code_B)
                if on_frame is not None:
                    on_frame(num_clips)
    return codes_BTP
