"""Clips made while training, from the same prompts and seeds every time.

Every rank makes all of them (tensor-parallel ranks must; ZeRO 3 gathers collectively); rank 0 writes.
Training's random numbers are not touched.

Tensor suffixes: B clips, T frames, P cells of a frame, h/w codes, H/W pixels, C channels, L text length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacog.checkpoint.rng import capture_rng, restore_rng
from megacog.config.schema import Config, Stage
from megacog.data.batch import Batch
from megacog.generation.clusters import Clusters
from megacog.generation.decode import generate_frames
from megacog.generation.output import Strip, watchable_scale, write_contact_sheet, write_gif
from megacog.generation.sampling import chooser
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog.tokenizers.frames import FrameTokenizer
from megacog.tokenizers.text import TextTokenizer
from megacog.training.engine import Engine

_EVALUATION_CLIPS = 4
"""Clips of the evaluation data whose missing frames the interpolation stage fills in."""


@dataclass(frozen=True)
class Sampler:
    """Makes the sample clips of a run.

    Args:
        config: Stage, prompts, seeds and sampling settings.
        text: Encodes the prompts.
        frames: Decodes codes to pixels.
        evaluation: Batch whose clips the interpolation stage starts from; None without evaluation data.
        clusters: As `clusters_for` gives them for the config.
    """

    config: Config
    text: TextTokenizer
    frames: FrameTokenizer
    evaluation: Batch | None
    clusters: Clusters | None

    def write(self, engine: Engine, step: int, write: bool) -> Path:
        """Make the clips of a step and, where `write` says so, store `samples/step-0001000/`. Collective."""
        folder = Path(self.config.train.run_dir) / "samples" / f"step-{step:07d}"
        rng = capture_rng()
        try:
            with engine.whole_model() as model:
                captions, codes_BTP = self._generate(model)
        finally:
            restore_rng(rng)
        if write:
            self._store(folder, captions, codes_BTP)
        return folder

    def _generate(self, model: CogVideo) -> tuple[list[str], Tensor]:
        if self.config.train.stage == "interpolation":
            return self._interpolate(model)
        prompts = list(self.config.samples.prompts)
        first_B1P = self._run(model, "base", self._encode(prompts, "base", None), [None] * len(prompts), {})
        if self.config.train.stage == "base":
            return prompts, first_B1P
        span = self.config.generation.seconds
        text, spans = self._encode(prompts, "sequential", span), [span] * len(prompts)
        return prompts, self._run(model, "sequential", text, spans, {0: first_B1P[:, 0]})

    def _interpolate(self, model: CogVideo) -> tuple[list[str], Tensor]:
        assert self.evaluation is not None, "checked when the run starts"
        batch = self.evaluation
        count = min(_EVALUATION_CLIPS, batch.frames_BTP.shape[0])
        given = stage_layout(model.config, "interpolation").given_frames
        known = {frame: batch.frames_BTP[:count, frame] for frame in given}
        text = (batch.text_BL[:count], batch.text_valid_BL[:count])
        spans = [(model.config.num_frames - 1) / float(fps) for fps in batch.fps_B[:count]]
        codes_BTP = self._run(model, "interpolation", text, spans, known)
        return list(batch.sample_ids[:count]), codes_BTP

    def _encode(self, prompts: list[str], stage: Stage, span: float | None) -> tuple[Tensor, Tensor]:
        model = self.config.model
        captions = [self.config.generation.caption(prompt, stage) for prompt in prompts]
        ids = [self.text.encode(caption, span, model.num_frames) for caption in captions]
        return self.text.pad(ids, model.text_length)

    def _run(
        self,
        model: CogVideo,
        stage: Stage,
        text: tuple[Tensor, Tensor],
        spans: Sequence[float | None],
        known: dict[int, Tensor],
    ) -> Tensor:
        settings = self.config.generation
        guidance = settings.guidance_of(stage)
        clusters = self.clusters.to(model.device) if self.clusters is not None else None
        null_ids = [self.text.encode_null(span, self.config.model.num_frames) for span in spans]
        null = self.text.pad(null_ids, self.config.model.text_length)
        seeds = range(self.config.samples.seed, self.config.samples.seed + text[0].shape[0])
        return generate_frames(
            model,
            stage,
            *text,
            null if guidance != 1.0 else None,
            known,
            guidance=guidance,
            choose=chooser(settings, stage, clusters),
            text_bias=settings.text_bias_of(stage),
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
            cuda_graphs=False,  # ZeRO 3 gathers weights as they are used, and NCCL's watchdog disturbs captures
        )

    def _store(self, folder: Path, captions: list[str], codes_BTP: Tensor) -> None:
        B, T, _ = codes_BTP.shape
        height, width = self.config.model.grid
        codes_Xhw = codes_BTP.reshape(B * T, height, width).to("cpu")
        frames_BTHWC = self.frames.decode(codes_Xhw).unflatten(0, (B, T)).numpy()
        scale = watchable_scale(*frames_BTHWC.shape[2:4])
        fps = (T - 1) / self.config.generation.seconds if T > 1 else 1.0
        folder.mkdir(parents=True, exist_ok=True)
        strips = [Strip(caption, frames) for caption, frames in zip(captions, frames_BTHWC, strict=True)]
        write_contact_sheet(folder / "contact_sheet.png", strips, scale=scale)
        if T > 1:
            for index, frames_THWC in enumerate(frames_BTHWC):
                write_gif(folder / f"{index:02d}.gif", frames_THWC, fps, scale=scale)
