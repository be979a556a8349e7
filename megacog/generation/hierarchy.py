"""Clips from captions: key frames first, then recursive interpolation, pass after pass for long clips.

One pass makes T key frames (T = model.num_frames): frame 0 from the base model, which knows no rate,
the others from the sequential stage, whose text says how many seconds the pass spans. Every level of
interpolation puts a new frame between each two, with half the span in the text: 5 -> 9 -> 17 -> 33
frames for T = 5. A clip that is longer than one pass slides: the next pass is given the last
`overlap` key frames, and only one pass is held in memory.

Tensor suffixes: B rows of a batch, K key frames, T frames, H/W pixels, C channels, P cells of a frame,
L text length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megacog.config.schema import GenerationConfig, Stage
from megacog.errors import ConfigError, DataError
from megacog.generation.clusters import Clusters, clusters_for
from megacog.generation.decode import generate_frames
from megacog.generation.reading import Reader
from megacog.generation.sampling import chooser, row_generator
from megacog.model.transformer import CogVideo
from megacog.tokenizers.frames import FrameTokenizer
from megacog.tokenizers.text import TextTokenizer


@dataclass(frozen=True)
class ClipRequest:
    """One clip to generate. `seed` and `sample` (with the text) key its random streams."""

    text: str
    seconds: float
    seed: int
    sample: int = 0
    given_KP: Tensor | None = None
    """Codes of the first key frames (an image or video prompt), int64; None = all are generated."""


@dataclass(frozen=True)
class ClipChunk:
    """Frames of one clip that are finished; chunks of a clip arrive in order."""

    clip: int
    """Index of the clip in the list of requests."""
    first_frame: int
    frames_THWC: np.ndarray
    """Pixels, uint8 RGB."""
    codes_TP: Tensor
    fps: float
    last: bool


@dataclass(frozen=True)
class ClipPlan:
    """How a clip of a given length is made."""

    span: float
    """Seconds between the first and the last key frame of one pass: the span of the sequential text."""
    fps: float
    """Frame rate of the finished clip."""
    frames: int
    key_intervals: int
    """Intervals between key frames that are interpolated; whole interpolation blocks."""
    passes: int


_MAX_SECONDS = 86400.0
_MAX_FPS = 10_000.0  # beyond that, video files cannot say it


def plan_clip(seconds: float, num_frames: int, settings: GenerationConfig) -> ClipPlan:
    """The plan of a clip of `seconds`: one pass if it fits into `settings.seconds`, else several.

    Raises:
        ConfigError: the overlap leaves no new key frame in a pass, or the model cannot interpolate.
        DataError: the clip would be absurdly long or fast.
    """
    if seconds > _MAX_SECONDS:
        raise DataError(f"a clip of {seconds:g} seconds is longer than the {_MAX_SECONDS:g} that are possible")
    if settings.overlap >= num_frames:
        raise ConfigError(
            f"generation.overlap {settings.overlap} leaves no new frame in a sequence of {num_frames} frames; "
            f"use at most {num_frames - 1}"
        )
    if settings.levels and num_frames % 2 == 0:
        raise ConfigError(
            f"generation.levels {settings.levels} needs a model with an odd model.num_frames to interpolate, "
            f"this one has {num_frames}; use generation.levels=0"
        )
    span = min(seconds, settings.seconds)
    pass_intervals = num_frames - 1
    key_rate = pass_intervals / span
    block = max(1, pass_intervals // 2)
    needed = max(pass_intervals, math.ceil(seconds * key_rate - 1e-6))
    key_intervals = math.ceil(needed / block) * block
    new_per_pass = num_frames - settings.overlap
    passes = 1 + math.ceil((key_intervals - pass_intervals) / new_per_pass)
    fps = key_rate * 2**settings.levels
    if fps > _MAX_FPS:
        raise DataError(
            f"a clip of {seconds:g} seconds would have {fps:g} frames per second, more than {_MAX_FPS:g}; "
            "ask for more seconds, or set fewer generation.levels"
        )
    return ClipPlan(span, fps, math.floor(seconds * fps + 1e-6) + 1, key_intervals, passes)


def sampled_frames(plan: ClipPlan, num_frames: int, given: int, settings: GenerationConfig) -> int:
    """Frames that the model samples for a clip (more than it shows when the last pass overshoots)."""
    keys = num_frames - given + (plan.passes - 1) * (num_frames - settings.overlap)
    return keys + plan.key_intervals * (2**settings.levels - 1)


def merge_blocks(blocks_BTP: Tensor) -> Tensor:
    """One sequence [B*(T-1) + 1, P] of consecutive blocks that share their border frames: k0, n1, k1, n3, ..., k."""
    return torch.cat([blocks_BTP[:, :-1].flatten(0, 1), blocks_BTP[-1:, -1]])


@dataclass
class _Clip:
    """State of a clip between passes."""

    index: int
    request: ClipRequest
    plan: ClipPlan
    keys_KP: Tensor
    """The newest key frames; the first of them is key frame number `first_key` of the clip."""
    first_key: int = 0
    shown_key: int = 0
    """Frames up to this key frame are handed out."""
    shown_frames: int = 0

    @property
    def last_key(self) -> int:
        return self.first_key + len(self.keys_KP) - 1

    @property
    def finished(self) -> bool:
        return self.shown_frames >= self.plan.frames

    def generator(self, *place: str | int) -> torch.Generator:
        """The random stream of one sequence of this clip."""
        return row_generator(self.request.text, self.request.seed, self.request.sample, *place)


@dataclass(frozen=True)
class _Row:
    """One sequence to sample: its clip, the span in its text, its random stream, its known frames."""

    clip: _Clip
    span: float | None
    generator: torch.Generator
    known: dict[int, Tensor] = field(default_factory=dict)


class ClipGenerator:
    """Generates clips with one model that holds the base and both attention-plus sets."""

    def __init__(
        self,
        model: CogVideo,
        text: TextTokenizer,
        frames: FrameTokenizer,
        settings: GenerationConfig,
        on_frame: Callable[[int], None] | None = None,
        clusters: Clusters | None = None,
    ) -> None:
        """Makes the clusters that the settings sample from.

        Args:
            model: Base and both attention-plus sets.
            text: Its text tokenizer.
            frames: Its frame tokenizer.
            settings: How clips are sampled.
            on_frame: Called with the number of frames just sampled (all clips of a batch together).
            clusters: The settings' clusters where they are at hand: k-means over a large codebook takes minutes.

        Raises:
            ConfigError, DataError: the settings' clusters cannot be had, see `clusters_for`.
        """
        self.model = model
        self.text = text
        self.frames = frames
        self.settings = settings
        self.on_frame = on_frame
        self.on_pixels: Callable[[int], None] | None = None
        """Called with the number of frames just decoded to pixels."""
        self.num_frames = model.config.num_frames
        self.reader = Reader(model)
        clusters = clusters if clusters is not None else clusters_for(settings, frames)
        self.clusters = clusters.to(model.device) if clusters is not None else None

    def check(self, request: ClipRequest) -> None:
        """Tokenize everything that the clip will need.

        Raises:
            DataError: a text (with guidance, also the null text) is empty or too long for the model.
        """
        plan = plan_clip(request.seconds, self.num_frames, self.settings)
        key_span, *spans = self.settings.text_spans(plan.span)
        spans_of: dict[Stage, Sequence[float | None]] = {
            "base": [None], "sequential": [key_span], "interpolation": spans
        }  # fmt: skip
        for stage, stage_spans in spans_of.items():
            caption = self.settings.caption(request.text, stage)
            ids = [self.text.encode(caption, span, self.num_frames) for span in stage_spans]
            self.text.pad(ids, self._text_length(ids))
            if self.settings.guidance_of(stage) != 1.0:
                null_ids = [self.text.encode_null(span, self.num_frames) for span in stage_spans]
                self.text.require_null_fits(stage_spans, self.num_frames, self._text_length(null_ids))

    def _text_length(self, ids: Sequence[Sequence[int]]) -> int:
        """What texts are padded to. Inherited models take longer ones than they were trained on, up to the table."""
        config = self.model.config
        if self.text.settings.trained_length is None:
            return config.text_length
        return max(config.text_length, min(max(map(len, ids), default=0), config.text_positions))

    def generate(self, requests: Sequence[ClipRequest]) -> Iterator[ClipChunk]:
        """Chunks of finished frames, `settings.batch_size` clips at a time, in constant memory."""
        size = self.settings.batch_size
        for start in range(0, len(requests), size):
            yield from self._generate_batch(start, requests[start : start + size])

    def _generate_batch(self, start: int, requests: Sequence[ClipRequest]) -> Iterator[ClipChunk]:
        clips = []
        for index, request in enumerate(requests, start):
            plan = plan_clip(request.seconds, self.num_frames, self.settings)
            given_KP = request.given_KP
            if given_KP is None:
                given_KP = torch.empty(0, self.model.config.cells, dtype=torch.int64)
            if len(given_KP) >= self.num_frames:
                raise ValueError(f"{len(given_KP)} given key frames leave none of {self.num_frames} to generate")
            clips.append(_Clip(index, request, plan, given_KP))
        self._first_frames([clip for clip in clips if len(clip.keys_KP) == 0])
        first_pass = True
        while clips:
            self._key_frames(clips, first_pass)
            first_pass = False
            yield from self._finish(clips)
            clips = [clip for clip in clips if not clip.finished]

    def _sample(self, stage: Stage, rows: Sequence[_Row]) -> Tensor:
        """Codes [B, T, P] on the CPU of rows that all know the same frames, `batch_size` at once."""
        size = self.settings.batch_size
        parts = [self._sample_batch(stage, rows[at : at + size]) for at in range(0, len(rows), size)]
        return torch.cat(parts)

    def _sample_batch(self, stage: Stage, rows: Sequence[_Row]) -> Tensor:
        guidance = self.settings.guidance_of(stage)
        captions = [self.settings.caption(row.clip.request.text, stage) for row in rows]
        ids = [self.text.encode(text, row.span, self.num_frames) for text, row in zip(captions, rows, strict=True)]
        guided = guidance != 1.0
        null_ids = [self.text.encode_null(row.span, self.num_frames) for row in rows] if guided else []
        length = self._text_length([*ids, *null_ids])
        text_BL, valid_BL = self.text.pad(ids, length)
        null_text = self.text.pad(null_ids, length) if guided else None
        known = {frame: torch.stack([row.known[frame] for row in rows]) for frame in rows[0].known}
        return generate_frames(
            self.model,
            stage,
            text_BL,
            valid_BL,
            null_text,
            known,
            guidance=guidance,
            choose=chooser(self.settings, stage, self.clusters),
            text_bias=self.settings.text_bias_of(stage),
            generators=[row.generator for row in rows],
            on_frame=self.on_frame,
            reader=self.reader,
            cuda_graphs=self.settings.cuda_graphs,
        ).cpu()

    def _first_frames(self, clips: Sequence[_Clip]) -> None:
        """Frame 0 from the base model, whose text carries no rate."""
        if not clips:
            return
        rows = [_Row(clip, None, clip.generator("base", 0)) for clip in clips]
        for clip, codes_TP in zip(clips, self._sample("base", rows), strict=True):
            clip.keys_KP = codes_TP

    def _key_frames(self, clips: Sequence[_Clip], first_pass: bool) -> None:
        """One sequential pass for every clip: its key frames grow to a whole sequence beyond the known ones."""
        known_counts = [len(clip.keys_KP) if first_pass else self.settings.overlap for clip in clips]
        for count in sorted(set(known_counts)):
            group = [clip for clip, known in zip(clips, known_counts, strict=True) if known == count]
            rows = []
            for clip in group:
                known_KP = clip.keys_KP[-count:]
                place = clip.last_key - count + 1
                generator = clip.generator("sequential", place)
                rows.append(_Row(clip, clip.plan.span, generator, dict(enumerate(known_KP))))
            for clip, codes_TP in zip(group, self._sample("sequential", rows), strict=True):
                clip.keys_KP = torch.cat([clip.keys_KP, codes_TP[count:]])

    def _finish(self, clips: Sequence[_Clip]) -> Iterator[ClipChunk]:
        """Interpolate the key frames that are complete, hand them out and forget them."""
        block = max(1, (self.num_frames - 1) // 2)
        ready, sequences = [], []
        for clip in clips:
            available = min(clip.last_key, clip.plan.key_intervals) - clip.shown_key
            intervals = available // block * block
            if intervals:
                start = clip.shown_key - clip.first_key
                ready.append(clip)
                sequences.append(clip.keys_KP[start : start + intervals + 1])
        keys_shown = [len(sequence) - 1 for sequence in sequences]
        for level in range(1, self.settings.levels + 1):
            sequences = self._interpolate(ready, sequences, level)
        for clip, intervals, codes_TP in zip(ready, keys_shown, sequences, strict=True):
            yield self._chunk(clip, codes_TP)
            clip.shown_key += intervals
            kept_from = min(clip.shown_key, clip.last_key - self.settings.overlap + 1)
            clip.keys_KP = clip.keys_KP[kept_from - clip.first_key :].clone()
            clip.first_key = kept_from

    def _interpolate(self, clips: Sequence[_Clip], sequences: Sequence[Tensor], level: int) -> list[Tensor]:
        """Each sequence with a new frame between every two: all blocks of all clips in shared batches."""
        block = (self.num_frames - 1) // 2
        rows, counts = [], []
        for clip, sequence_TP in zip(clips, sequences, strict=True):
            first = clip.shown_key * 2 ** (level - 1)
            starts = range(0, len(sequence_TP) - 1, block)
            counts.append(len(starts))
            for start in starts:
                known = {2 * offset: sequence_TP[start + offset] for offset in range(block + 1)}
                generator = clip.generator("interpolation", level, first + start)
                rows.append(_Row(clip, clip.plan.span / 2**level, generator, known))
        if not rows:
            return []
        blocks = self._sample("interpolation", rows).split(counts)
        return [merge_blocks(blocks_BTP) for blocks_BTP in blocks]

    def _chunk(self, clip: _Clip, codes_TP: Tensor) -> ClipChunk:
        """The new frames of a finished stretch; its first frame was handed out with the stretch before."""
        if clip.shown_frames:
            codes_TP = codes_TP[1:]
        codes_TP = codes_TP[: clip.plan.frames - clip.shown_frames]
        first_frame = clip.shown_frames
        clip.shown_frames += len(codes_TP)
        height, width = self.model.config.grid
        frames_THWC = self.frames.decode(codes_TP.view(-1, height, width), self.on_pixels).cpu().numpy()
        return ClipChunk(clip.index, first_frame, frames_THWC, codes_TP, clip.plan.fps, clip.finished)


def whole_clips(chunks: Iterator[ClipChunk]) -> Iterator[tuple[int, np.ndarray, float]]:
    """(index, frames [T, H, W, C] uint8, fps) of every clip, as soon as it is complete."""
    parts: dict[int, list[np.ndarray]] = {}
    for chunk in chunks:
        parts.setdefault(chunk.clip, []).append(chunk.frames_THWC)
        if chunk.last:
            yield chunk.clip, np.concatenate(parts.pop(chunk.clip)), chunk.fps
