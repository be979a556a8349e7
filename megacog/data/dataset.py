"""From a position of the sample stream to codes and text.

Everything random about a sample (rate, window, dropped caption, corrupted context) is a function of
(seed, phase, source, epoch, clip).

Dimensions: B batch, T frames, P cells of a frame.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacog.config.schema import Config, SourceConfig
from megacog.data.batch import BatchArrays
from megacog.data.draws import below, draw, unit
from megacog.data.rates import RateRule, Window
from megacog.data.sampler import Mixture, Sample
from megacog.data.shards import Shard, expand_shards
from megacog.errors import DataError
from megacog.model.layout import stage_layout
from megacog.tokenizers.text import TextTokenizer

# Evaluation sees the same samples in every run, whatever its seed.
EVALUATION_SEED = 20220529
_CACHED_CAPTIONS = 1 << 16
# Processes may usually open 1024 files.
OPEN_SHARDS = 256


class Source:
    """The clips of one entry of `data.train` or `data.eval`, numbered through all its shards.

    Attributes:
        name: where the config names it, and its path; for messages.
        weight: share in the mixture.
        shards: in name order.
        lengths: stored frames of each clip, int64 [V].
        fps: stored rate of each clip, float64 [V].
    """

    def __init__(self, config: SourceConfig, name: str) -> None:
        self.name = f"{name} ({config.path})"
        self.weight = config.weight
        self.shards = [Shard(path) for path in expand_shards(config.path)]
        self._starts = np.cumsum([0, *(shard.num_clips for shard in self.shards)]).tolist()
        self.lengths = np.concatenate([shard.num_frames for shard in self.shards])
        self.fps = np.concatenate([shard.fps for shard in self.shards]).astype(np.float64)

    def __len__(self) -> int:
        return len(self.lengths)

    def locate(self, clip: int) -> tuple[Shard, int]:
        """Returns the shard of a clip and the clip's number in it."""
        shard = bisect_right(self._starts, clip) - 1
        return self.shards[shard], clip - self._starts[shard]

    @cached_property
    def kinds(self) -> tuple[list[tuple[int, float]], NDArray[np.int32]]:
        """The different (stored frames, stored rate) of clips, ascending, and which of them each clip is [V].

        Millions of clips are of few kinds, and what a clip can be used for depends on its kind alone.
        """
        rates, rate_of_clip = np.unique(self.fps, return_inverse=True)
        codes, kind_of_clip = np.unique(self.lengths * len(rates) + rate_of_clip, return_inverse=True)
        kinds = [(int(code) // len(rates), float(rates[code % len(rates)])) for code in codes]
        return kinds, kind_of_clip.astype(np.int32)

    def usable(self, rule: RateRule, min_fps: float) -> NDArray[np.int64]:
        """Returns the clips that hold the stage's frames at some rate, int64, ascending."""
        kinds, kind_of_clip = self.kinds
        feasible = [bool(rule.feasible(length, fps, min_fps)) for length, fps in kinds]
        return np.flatnonzero(np.array(feasible, dtype=bool)[kind_of_clip])


def open_sources(configs: Sequence[SourceConfig], name: str) -> list[Source]:
    """Returns the sources of `data.train` or `data.eval`.

    Raises:
        DataError: there is none, or a shard is missing or damaged.
    """
    if not configs:
        raise DataError(f"{name} names no shards. Add an entry such as `- path: data/clips-*.h5`.")
    return [Source(config, f"{name}[{index}]") for index, config in enumerate(configs)]


class Texts:
    """Token ids of rate texts and captions, each made once."""

    def __init__(self, text: TextTokenizer, num_frames: int) -> None:
        self._text, self._num_frames = text, num_frames
        self.rate = lru_cache(_CACHED_CAPTIONS)(self._rate)
        self._caption = lru_cache(_CACHED_CAPTIONS)(lambda caption: tuple(text.encode(caption, None)))
        self.null = tuple(text.encode_null(None))

    def of(self, shard: Shard, clip: int, span_seconds: float | None, dropped: bool = False) -> list[int]:
        """Returns the text of a window of a clip: rate text, separator and caption, or with it dropped the null one.

        Ids that came with the clip name the rate of all its frames. A window from the first to the last of them
        gets these ids as they are; any other one gets its own rate text before their caption.
        """
        stored, caption = self._parts(shard, clip)
        last = int(shard.num_frames[clip]) - 1
        whole = span_seconds is not None and round(span_seconds * float(shard.fps[clip])) == last
        rate = stored if stored and whole else self.rate(span_seconds)
        return [*rate, *(self.null if dropped else caption)]

    def _rate(self, span_seconds: float | None) -> tuple[int, ...]:
        """Returns the ids in front of the caption: rate text and separator, nothing for a single frame."""
        if span_seconds is None:
            return ()
        ids = self._text.encode_null(span_seconds, self._num_frames)
        return tuple(ids[: len(ids) - len(self.null)])

    def _parts(self, shard: Shard, clip: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the ids through the separator and behind it if this tokenizer made them; else (), the caption's."""
        if shard.text_tokenizer == self._text.fingerprint:
            ids = tuple(shard.token_ids(clip).tolist())
            start = ids.index(self._text.separator_id) + 1 if self._text.separator_id in ids else 0
            return ids[:start], ids[start:]
        try:
            return (), self._caption(shard.captions[clip])
        except DataError as error:
            raise DataError(f"{shard.path}: clip {shard.clip_ids[clip]!r}: {error}") from None


class StageDataset:
    """The stream of samples of one stage.

    Args:
        config: of the run.
        sources: opened `data.train` or `data.eval`.
        text: text tokenizer.
        training: false gives evaluation: own seed, no dropout, no corruption, the final rates.

    Raises:
        DataError: a source has no clip that the stage can use.
    """

    def __init__(self, config: Config, sources: Sequence[Source], text: TextTokenizer, *, training: bool) -> None:
        train, data = config.train, config.data
        self.sources = sources
        self.layout = stage_layout(config.model, train.stage)
        self.rule = RateRule(train.stage, self.layout.grid.frames, data.rates, data.base_frame)
        self.codebook_size = config.model.image_vocab_size
        self._text_vocab_size = config.model.text_vocab_size
        self.texts = Texts(text, config.model.num_frames)
        self._video_share = data.base_video_share if train.stage == "base" else 0.0
        self._video_rule = RateRule("sequential", config.model.num_frames, data.rates)
        self._open: dict[Shard, None] = {}  # in the order of last use
        self._seed = train.seed if training else EVALUATION_SEED
        self._dropout = data.caption_dropout if training else 0.0
        self._corruption = train.context_corruption if training and self.layout.given_frames else 0.0
        starts = [step for step in self.rule.phase_starts if step < train.steps]
        self.phase_starts = starts if training else [0]
        self.min_fps = [self.rule.min_fps(step) for step in (starts if training else starts[-1:])]
        self._usable = [[self._require_usable(source, min_fps) for source in sources] for min_fps in self.min_fps]
        weights = [source.weight for source in sources]
        self._mixtures = [
            Mixture([len(clips) for clips in usable], weights, self._seed, phase)
            for phase, usable in enumerate(self._usable)
        ]

    def _require_usable(self, source: Source, min_fps: float) -> NDArray[np.int64]:
        clips = source.usable(self.rule, min_fps)
        if not len(clips):
            rates = self.rule.config.interpolation if self.rule.stage == "interpolation" else self.rule.config.series
            longest = f", the longest has {source.lengths.max()} frames" if len(source) else ""
            raise DataError(
                f"{source.name} has no clip that stage {self.rule.stage!r} can use: {len(source)} clips{longest}; "
                f"needed are {self.layout.grid.frames} frames at one of {list(rates)} fps, at least {min_fps:g} fps. "
                "Prepare longer clips, change data.rates, or remove the source."
            )
        return clips

    def phase_at(self, step: int) -> int:
        """Returns the rate phase of an optimizer step."""
        return bisect_right(self.phase_starts, step) - 1

    def batch(self, phase: int, positions: Sequence[int], note: Callable[[str], None] | None = None) -> BatchArrays:
        """Returns the samples at positions of a phase's stream.

        Args:
            phase: of the rates.
            positions: in the stream.
            note: called with the clip that is going to be read.

        Raises:
            DataError: a frame is damaged; the message names shard, clip and frame.
        """
        samples = [self._sample(phase, sample, note) for sample in self._mixtures[phase].at(positions)]
        texts, frames, contexts, fps, ids = zip(*samples, strict=True)
        context_BTP = np.stack(contexts) if self._corruption else None
        return BatchArrays(list(texts), np.stack(frames), context_BTP, list(fps), list(ids))

    def _sample(
        self, phase: int, sample: Sample, note: Callable[[str], None] | None
    ) -> tuple[list[int], NDArray[Any], NDArray[Any], float, str]:
        """Returns (text ids, codes [T, P], corrupted codes [T, P], fps, id)."""
        source = self.sources[sample.source]
        clip = int(self._usable[phase][sample.source][sample.index])
        length = int(source.lengths[clip])
        numbers = draw(self._seed, "sample", phase, sample.source, sample.epoch, clip)
        window, span_seconds = self._window(length, float(source.fps[clip]), self.min_fps[phase], numbers)
        shard, local = source.locate(clip)
        self._mark_used(shard)
        if note is not None:
            note(f"clip {shard.clip_ids[local]!r} of {shard.path}")
        codes_TP = shard.read(local, window.indices).reshape(window.frames, -1)
        dropped = unit(numbers[3]) < self._dropout
        text = self.texts.of(shard, local, span_seconds, dropped)
        self._check_range(shard, local, "code", codes_TP, self.codebook_size)
        self._check_range(shard, local, "text token", text, self._text_vocab_size)
        context_TP = self._corrupt(codes_TP, numbers[4:6]) if self._corruption else codes_TP
        return text, codes_TP, context_TP, window.fps, _sample_id(shard.clip_ids[local], window)

    def _window(
        self, length: int, fps: float, min_fps: float, numbers: Sequence[int]
    ) -> tuple[Window, float | None]:
        """Returns the frames of one sample and the seconds that its rate text tells."""
        if unit(numbers[6]) < self._video_share:
            rates = self._video_rule.feasible(length, fps)
            if rates:
                video = self._video_rule.window(length, rates, numbers[:3])
                frame = video.indices[below(numbers[7], video.frames)]
                return Window(frame, 1, 0.0, 1), video.span_seconds
        window = self.rule.window(length, self.rule.feasible(length, fps, min_fps), numbers[:3])
        return window, window.span_seconds

    @staticmethod
    def _check_range(shard: Shard, clip: int, what: str, ids: Sequence[int] | NDArray[Any], size: int) -> None:
        """An id that is too large would be an illegal address on a GPU, or somebody else's embedding."""
        lowest, highest = int(np.min(ids)), int(np.max(ids))
        if lowest < 0 or highest >= size:
            raise DataError(
                f"{shard.path}: clip {shard.clip_ids[clip]}: {what} {lowest if lowest < 0 else highest} is outside "
                f"0..{size - 1}, what the model has. Prepare the shard again, with the tokenizers of this run"
            )

    def _mark_used(self, shard: Shard) -> None:
        """Closes the shard that was not used for longest when too many are open."""
        self._open.pop(shard, None)
        self._open[shard] = None
        if len(self._open) > OPEN_SHARDS:
            oldest = next(iter(self._open))
            oldest.close()
            del self._open[oldest]

    def _corrupt(self, codes_TP: NDArray[Any], numbers: Sequence[int]) -> NDArray[Any]:
        """Returns a copy in which a share of the given frames' codes is drawn anew from the codebook."""
        generator = np.random.Generator(np.random.Philox(key=list(numbers)))
        context_TP = codes_TP.copy()
        given = list(self.layout.given_frames)
        shape = (len(given), codes_TP.shape[1])
        fresh = generator.integers(0, self.codebook_size, shape).astype(codes_TP.dtype)
        context_TP[given] = np.where(generator.random(shape) < self._corruption, fresh, codes_TP[given])
        return context_TP


def _sample_id(clip_id: str, window: Window) -> str:
    indices = window.indices
    return f"{clip_id}[{indices[0]}:{indices[-1] + 1}:{indices.step}]"
