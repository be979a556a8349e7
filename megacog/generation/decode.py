"""Sampling the unknown frames of one sequence with the decode cache, in as few steps as the masks allow.

Tensor suffixes: B clips, L text length, T frames, P cells of a frame, F = T * P, V codes, S steps, W codes of a step,
R rows of the cache (B, or 2 B with guidance: captioned rows first, null rows after them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megacog.config.schema import Stage
from megacog.generation.cache import Decoder, stage_masks
from megacog.generation.reading import Reader
from megacog.generation.replay import Replayed, can_capture
from megacog.generation.sampling import Choose, draw_uniforms, guide
from megacog.generation.schedule import Schedule, schedule
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo


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


class Sampler:
    """Samples the codes of a schedule, step by step.

    A step is a function of device memory alone: where it stands, what was sampled and every random number lie
    there, all shapes depend only on how many codes it samples, and the host reads nothing.

    Args:
        decoder: Caches of R rows.
        steps: Which codes come in which step.
        codes_BF: int64, filled in place; cells that are not known yet hold any code.
        uniform_BF: fp64 random number of every code.
        guidance: Scale; the decoder holds null rows unless it is 1.
        choose: Draws codes from logits.
    """

    def __init__(
        self,
        decoder: Decoder,
        steps: Schedule,
        codes_BF: Tensor,
        uniform_BF: Tensor,
        guidance: float,
        choose: Choose,
    ) -> None:
        self.decoder, self.codes_BF, self.uniform_BF = decoder, codes_BF, uniform_BF
        self.guided, self.guidance, self.choose = guidance != 1.0, guidance, choose
        tokens = [[*step.tokens, *[0] * (steps.width - len(step.tokens))] for step in steps.steps]
        self.token_SW = torch.tensor(tokens, dtype=torch.int64, device=codes_BF.device)
        self.next_1 = torch.zeros(1, dtype=torch.int64, device=codes_BF.device)

    def both_streams(self, codes_BX: Tensor) -> Tensor:
        """Codes of clips as codes of the cache's rows."""
        return torch.cat([codes_BX, codes_BX]) if self.guided else codes_BX

    def step(self, width: int) -> None:
        """The next step, which samples `width` codes of every clip."""
        token_W = self.token_SW.index_select(0, self.next_1)[0, :width]
        previous_BW = self.codes_BF[:, (token_W - 1).clamp_min(0)]
        logits_RWV = self.decoder.step(token_W, self.both_streams(previous_BW))
        if self.guided:
            conditional_BWV, null_BWV = logits_RWV.chunk(2)
            logits_RWV = guide(conditional_BWV, null_BWV, self.guidance)
        codes = self.choose(logits_RWV.flatten(0, 1), self.uniform_BF[:, token_W].flatten())
        self.codes_BF.index_copy_(1, token_W, codes.view(-1, width))
        self.next_1 += 1


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
    reader: Reader | None = None,
    steps: Schedule | None = None,
    cuda_graphs: bool = True,
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
        on_frame: called with B when a frame is complete.
        reader: remembers texts from call to call; None = read them here.
        steps: which codes come in which step, with the same codes as the result; None = as few steps as can be.
        cuda_graphs: replay the steps from CUDA graphs where that is possible.

    Raises:
        ValueError: arguments do not fit, or an open frame is unknown.
    """
    num_clips = text_BL.shape[0]
    if len(generators) != num_clips:
        raise ValueError(f"{len(generators)} generators for {num_clips} clips")
    guided = guidance != 1.0
    if guided and null_text is None:
        raise ValueError(f"guidance {guidance} needs null_text")
    grid, device = stage_layout(model.config, stage).grid, model.device
    outside = sorted(frame for frame in known if not 0 <= frame < grid.frames)
    if outside:
        raise ValueError(f"known frames {outside} are outside a sequence of {grid.frames} frames")
    if steps is None:
        steps = schedule(stage_masks(model, stage, plus), grid, frozenset(known))

    text_RL, valid_RL = text_BL, text_valid_BL
    if guided:
        assert null_text is not None
        text_RL = torch.cat([text_BL, null_text[0].expand_as(text_BL)])
        valid_RL = torch.cat([text_valid_BL, null_text[1].expand_as(text_valid_BL)])
    uniform_BTP = torch.zeros(num_clips, grid.frames, grid.cells, dtype=torch.float64)
    drawn = draw_uniforms(generators, len(steps.frames) * grid.cells)
    uniform_BTP[:, list(steps.frames)] = drawn.view(num_clips, len(steps.frames), grid.cells)
    codes_BTP = torch.zeros(num_clips, grid.frames, grid.cells, dtype=torch.int64, device=device)
    for frame, codes_BP in known.items():
        codes_BTP[:, frame] = codes_BP.to(device)

    with _sampling_mode(model):
        decoder = Decoder(model, stage, text_RL, valid_RL, plus, text_bias, steps.lane, reader)
        uniform_BF = uniform_BTP.flatten(1).to(device)
        sampler = Sampler(decoder, steps, codes_BTP.view(num_clips, -1), uniform_BF, guidance, choose)
        run = Replayed(sampler.step) if cuda_graphs and can_capture(model) else sampler.step
        for step in steps.steps:
            if step.give:
                decoder.give({frame: sampler.both_streams(codes_BTP[:, frame]) for frame in step.give})
            run(len(step.tokens))
            complete = sum(token % grid.cells == grid.cells - 1 for token in step.tokens)
            if on_frame is not None and complete:
                if device.type == "cuda":  # the host is ahead of it
                    torch.cuda.synchronize(device)
                for _ in range(complete):
                    on_frame(num_clips)
    return codes_BTP
