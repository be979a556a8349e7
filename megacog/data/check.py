"""What a configuration would train on: checks before the first step, and tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from megacog.config.schema import Config, ModelConfig, Stage
from megacog.data.dataset import Source, Texts, open_sources
from megacog.data.rates import Rate, RateRule
from megacog.data.shards import Shard
from megacog.errors import ConfigError, DataError
from megacog.model.layout import stage_layout
from megacog.tokenizers.text import TextTokenizer

_NAMED = 5  # clips that a message lists


@dataclass(frozen=True)
class SourceSummary:
    """One entry of `data.train` or `data.eval`.

    Attributes:
        name: where the config names it.
        shards: files.
        clips: all of them.
        skipped: clips too short for every rate of the stage.
        frames: stored frames.
        hours: stored duration.
        tokenized: clips whose texts are token ids that came with them.
        retokenized: clips with token ids of another text tokenizer, whose captions are tokenized anew.
    """

    name: str
    shards: int
    clips: int
    skipped: int
    frames: int
    hours: float
    tokenized: int
    retokenized: int

    def __str__(self) -> str:
        skipped = f", {self.skipped} too short for every rate: not used" if self.skipped else ""
        return (
            f"{self.name}: {self.clips} clips{skipped}; {self.frames} frames, {self.hours:.2f} hours "
            f"in {self.shards} shard(s); texts: {self._texts}"
        )

    @property
    def _texts(self) -> str:
        if self.tokenized == self.clips:
            return "stored token ids"
        foreign = (
            f"; token ids of {self.retokenized} clips are another text tokenizer's and not used"
            if self.retokenized
            else ""
        )
        captions = f"captions of {self.clips - self.tokenized}" if self.tokenized else "captions"
        return (f"stored token ids of {self.tokenized} clips, " if self.tokenized else "") + captions + foreign


@dataclass(frozen=True)
class DataSummary:
    """Result of `check_data`; its text is one line per source."""

    train: tuple[SourceSummary, ...]
    eval: tuple[SourceSummary, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.train, *self.eval)))


@dataclass(frozen=True)
class RateRow:
    """One rate of the clips x rates table.

    Attributes:
        from_step: first optimizer step of the phase.
        fps: rate; None for single frames (base) and, with share 0, for clips that fit no rate.
        span_seconds: from the first to the last frame of a sample; None without a rate.
        clips: clips that hold the stage's frames at this rate.
        share: expected share of the training samples at this rate.
    """

    from_step: int
    fps: float | None
    span_seconds: float | None
    clips: int
    share: float


def check_data(
    config: Config, frame_tokenizer_fingerprint: str | None = None, text: TextTokenizer | None = None
) -> DataSummary:
    """Returns what there is to train on, after checking that it fits the model and itself.

    Args:
        config: of the run.
        frame_tokenizer_fingerprint: of the tokenizer that decodes the model's frames; None = only check
            that all shards agree.
        text: text tokenizer; None = the one of `tokenizer.text`.

    Raises:
        ConfigError: the text tokenizer has more pieces than the model's text embedding.
        DataError: shards are missing, damaged, of another tokenizer, grid or codebook, or share clips
            between training and evaluation; a source is empty; a text is too long at one of the rates.
    """
    text = text if text is not None else TextTokenizer.load(Path(config.tokenizer.text))
    train = open_sources(config.data.train, "data.train")
    held_out = open_sources(config.data.eval, "data.eval") if config.data.eval else []
    _check_metas([*train, *held_out], config.model, frame_tokenizer_fingerprint)
    _check_disjoint(train, held_out)
    if text.vocab_size > config.model.text_vocab_size:
        raise ConfigError(
            f"the text tokenizer has {text.vocab_size} pieces, model.text_vocab_size is "
            f"{config.model.text_vocab_size}. Raise model.text_vocab_size to {text.vocab_size} or more."
        )
    rule = _rule(config, config.train.stage)
    rules = [rule]
    if config.train.stage == "base" and config.data.base_video_share:
        rules.append(_rule(config, "sequential"))
    texts = Texts(text, config.model.num_frames)
    _check_fixed_texts(config, text, _spans(config, rules, (*train, *held_out)))
    for source in (*train, *held_out):
        _check_texts(source, rules, texts, text, config.model.text_length)
    return DataSummary(
        tuple(_summary(source, rule, text) for source in train),
        tuple(_summary(source, rule, text) for source in held_out),
    )


def rate_table(config: Config, stage: Stage | None = None) -> list[RateRow]:
    """Returns clips x rates of `data.train`, phase by phase, rates ascending.

    Args:
        config: of a run.
        stage: instead of `train.stage`.
    """
    rule = _rule(config, stage or config.train.stage)
    sources = open_sources(config.data.train, "data.train")
    rows = []
    for step in rule.phase_starts:
        rows += _phase_rows(rule, sources, step)
    return rows


def _phase_rows(rule: RateRule, sources: Sequence[Source], step: int) -> list[RateRow]:
    min_fps = rule.min_fps(step)
    total_weight = sum(source.weight for source in sources)
    clips: dict[float, int] = {}
    spans: dict[float, float] = {}
    shares: dict[float, float] = {}
    unused = 0
    for source in sources:
        usable = len(source.usable(rule, min_fps))
        unused += len(source) - usable
        kinds, kind_of_clip = source.kinds
        for (length, fps), count in zip(kinds, np.bincount(kind_of_clip).tolist(), strict=True):
            rates = rule.feasible(length, fps, min_fps)
            for rate, probability in zip(rates, rule.probabilities(rates) if rates else [], strict=True):
                key = float(f"{rate.fps:.3g}")
                if rate.fps:
                    spans.setdefault(key, (rule.frames - 1) / rate.fps)
                clips[key] = clips.get(key, 0) + count
                share = source.weight / total_weight * count / usable * probability
                shares[key] = shares.get(key, 0.0) + share
    rows = [
        RateRow(step, fps or None, spans.get(fps), clips[fps], shares[fps])
        for fps in sorted(clips)
    ]
    return [*rows, RateRow(step, None, None, unused, 0.0)] if unused else rows


def _rule(config: Config, stage: Stage) -> RateRule:
    frames = stage_layout(config.model, stage).grid.frames
    return RateRule(stage, frames, config.data.rates, config.data.base_frame)


def _check_metas(sources: Sequence[Source], model: ModelConfig, fingerprint: str | None) -> None:
    shards = [shard for source in sources for shard in source.shards]
    for shard in shards:
        meta = shard.meta
        if meta.grid != model.grid:
            raise DataError(
                f"{shard.path} holds frames of {meta.grid[0]} x {meta.grid[1]} codes, model.grid is "
                f"{list(model.grid)}. Correct model.grid, or prepare the videos at the model's size."
            )
        if meta.codebook_size != model.image_vocab_size:
            raise DataError(
                f"{shard.path} has codebook_size {meta.codebook_size}, model.image_vocab_size is "
                f"{model.image_vocab_size}. Use shards of the model's frame tokenizer, or correct "
                "model.image_vocab_size."
            )
        if meta.temporal_factor != 1:
            raise DataError(
                f"{shard.path} has temporal_factor {meta.temporal_factor}: its codes span several frames, so "
                "lower rates are no strides. Use a tokenizer with one code grid per frame."
            )
        expected, whose = fingerprint, "the run's frame tokenizer (tokenizer.frames)"
        if expected is None:
            expected, whose = shards[0].meta.tokenizer_fingerprint, str(shards[0].path)
        if meta.tokenizer_fingerprint != expected:
            raise DataError(
                f"{shard.path} was made by another frame tokenizer ({meta.tokenizer_fingerprint[:12]}...) than "
                f"{whose} ({expected[:12]}...): the same code means another picture. Prepare it again with "
                "the run's tokenizer, or use the tokenizer that made it."
            )


def _check_disjoint(train: Sequence[Source], held_out: Sequence[Source]) -> None:
    held_out_ids = {clip_id for source in held_out for shard in source.shards for clip_id in shard.clip_ids}
    if not held_out_ids:
        return
    for source in train:
        for shard in source.shards:
            common = sorted(held_out_ids.intersection(shard.clip_ids))
            if common:
                more = ", ..." if len(common) > _NAMED else ""
                raise DataError(
                    f"{len(common)} clip(s) of {shard.path} are in data.train and in data.eval: "
                    f"{', '.join(common[:_NAMED])}{more}. Evaluation would measure memory. Split with "
                    "`launch/prepare.py run --eval-fraction`."
                )


def _spans(config: Config, rules: Sequence[RateRule], sources: Sequence[Source]) -> list[float | None]:
    """Returns every span that a text of this config may name: of its rates, of stored rates, of generation."""
    rates = {rate.fps for rule in rules for source in sources for rate in _rates(source, rule) if rate.fps}
    if rules[-1].stage == "base":
        return [None]
    rates.update(config.data.rates.series, config.data.rates.interpolation)
    spans = {(rules[-1].frames - 1) / rate for rate in rates}
    return [None, *sorted(spans.union(config.generation.text_spans(config.generation.seconds)), reverse=True)]


def _rates(source: Source, rule: RateRule) -> set[Rate]:
    return {rate for length, fps in source.kinds[0] for rate in rule.feasible(length, fps)}


def _check_fixed_texts(config: Config, text: TextTokenizer, spans: Sequence[float | None]) -> None:
    """Raises DataError if the null text or a sample prompt does not fit."""
    model, generation = config.model, config.generation
    if config.data.caption_dropout or any(generation.guidance_of(stage) != 1.0 for stage in get_args(Stage)):
        text.require_null_fits(spans, model.num_frames, model.text_length)
    if config.samples.every and config.train.stage != "interpolation":
        sampled: list[tuple[Stage, float | None]] = [("base", None)]
        if config.train.stage == "sequential":
            sampled.append(("sequential", generation.seconds))
        for prompt in config.samples.prompts:
            captions = [(generation.caption(prompt, stage), span) for stage, span in sampled]
            text.pad([text.encode(caption, span, model.num_frames) for caption, span in captions], model.text_length)


def _check_texts(
    source: Source, rules: Sequence[RateRule], texts: Texts, text: TextTokenizer, text_length: int
) -> None:
    """Raises DataError for an empty source and for a text that does not fit."""
    if not len(source):
        raise DataError(f"{source.name} holds no clips. Prepare some, or remove the source.")
    kinds, kind_of_clip = source.kinds
    spans = [
        list({_span(rule, rate) for rule in rules for rate in rule.feasible(length, fps)}) for length, fps in kinds
    ]
    # Every caption is tokenized once: in front of one of the tokenizer's own texts only the longest rate text matters.
    longest = [sorted(each, key=lambda span: len(texts.rate(span)))[-1:] for each in spans]
    first = 0
    for shard in source.shards:
        to_try = spans if shard.text_tokenizer == text.fingerprint else longest
        for clip, kind in enumerate(kind_of_clip[first : first + shard.num_clips].tolist()):
            for span in to_try[kind]:
                _check_text(shard, clip, texts.of(shard, clip, span), text, text_length)
        first += shard.num_clips


def _check_text(shard: Shard, clip: int, ids: Sequence[int], text: TextTokenizer, text_length: int) -> None:
    if len(ids) > text_length:
        _raise_too_long(shard, clip, len(ids), text_length)
    if max(ids) >= text.vocab_size:
        raise DataError(
            f"{shard.path}: clip {shard.clip_ids[clip]!r} has token id {max(ids)}, the text tokenizer "
            f"{text.vocab_size} pieces. Prepare the shard again with this text tokenizer."
        )


def _span(rule: RateRule, rate: Rate) -> float | None:
    """Returns the seconds that the text of a sample at a rate names."""
    return (rule.frames - 1) / rate.fps if rate.fps else None


def _raise_too_long(shard: Shard, clip: int, length: int, text_length: int) -> None:
    caption = shard.captions[clip]
    shown = caption if len(caption) <= 60 else f"{caption[:57]}..."
    raise DataError(
        f"{shard.path}: clip {shard.clip_ids[clip]!r} has a text of {length} tokens, its rate included, more than "
        f"model.text_length {text_length}: {shown!r}. Shorten the caption or raise model.text_length."
    )


def _summary(source: Source, rule: RateRule, text: TextTokenizer) -> SourceSummary:
    lowest = min(rule.min_fps(step) for step in rule.phase_starts)
    return SourceSummary(
        name=source.name,
        shards=len(source.shards),
        clips=len(source),
        skipped=len(source) - len(source.usable(rule, lowest)),
        frames=int(source.lengths.sum()),
        hours=float((source.lengths / source.fps).sum() / 3600),
        tokenized=sum(shard.num_clips for shard in source.shards if shard.text_tokenizer == text.fingerprint),
        retokenized=sum(
            shard.num_clips for shard in source.shards if shard.text_tokenizer not in (None, text.fingerprint)
        ),
    )
