"""What is in shards: how many clips of which length, rate and caption length, and which codes they use."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megacog.config.schema import Config, SourceConfig
from megacog.data.shards import Shard, expand_shards
from megacog.errors import DataError

if TYPE_CHECKING:
    from megacog.tokenizers.frames import FrameTokenizer

_BINS = 8
_BAR_CHARACTERS = 30
_BLOCK_FRAMES = 4096


class ShardSet:
    """Open shards that go together; a context manager.

    Attributes:
        shards: the readers, in the order given.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises: DataError: a shard is missing, damaged or of another tokenizer or grid."""
        paths = [path for pattern in patterns for path in expand_shards(pattern)]
        self._stack = ExitStack()
        self.shards = [self._stack.enter_context(Shard(path)) for path in dict.fromkeys(paths)]
        first = self.shards[0]
        for shard in self.shards:
            for name in ("tokenizer_fingerprint", "grid", "codebook_size"):
                ours, theirs = getattr(first.meta, name), getattr(shard.meta, name)
                if ours != theirs:
                    self._stack.close()
                    raise DataError(
                        f"{shard.path} has {name} {theirs}, {first.path} has {ours}: they were made with "
                        "different frame tokenizers or sizes. Inspect (and train on) sets that agree."
                    )

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def require_tokenizer(self, tokenizer: FrameTokenizer) -> None:
        """Raises DataError if another frame tokenizer made the shards."""
        first = self.shards[0]
        if tokenizer.fingerprint != first.meta.tokenizer_fingerprint:
            raise DataError(
                f"{first.path} was made with frame tokenizer {first.meta.tokenizer_fingerprint[:16]}, "
                f"--tokenizer is {tokenizer.fingerprint[:16]}. Name the folder of the one that made the shards."
            )

    def require_clips(self) -> int:
        """Returns how many clips there are.

        Raises:
            DataError: none.
        """
        if not (clips := sum(shard.num_clips for shard in self.shards)):
            raise DataError(f"{self.shards[0].path} and the others hold no clips. Prepare some.")
        return clips

    def spread(self, count: int) -> list[tuple[Shard, int]]:
        """Returns at most `count` clips, evenly spread over the set, as (shard, clip)."""
        ends = np.cumsum([shard.num_clips for shard in self.shards])
        total = int(ends[-1])
        picks = np.unique(np.linspace(0, max(total - 1, 0), min(count, total)).round().astype(int))
        places = [int(np.searchsorted(ends, pick, side="right")) for pick in picks]
        return [
            (self.shards[place], int(pick - ends[place] + self.shards[place].num_clips))
            for place, pick in zip(places, picks, strict=True)
        ]


def statistics(shards: ShardSet, code_frames: int = 100_000) -> dict[str, Any]:
    """Returns the figures of a set as a JSON-able dict.

    Args:
        shards: the set.
        code_frames: about how many frames to count codes in, spread over all clips; 0 = all.
    """
    readers = shards.shards
    meta = readers[0].meta
    lengths = np.concatenate([shard.num_frames for shard in readers])
    fps = np.concatenate([shard.fps for shard in readers]).astype(np.float64)
    captions = np.asarray([len(caption) for shard in readers for caption in shard.captions], dtype=np.int64)
    return {
        "shards": len(readers),
        "bytes": sum(shard.path.stat().st_size for shard in readers),
        "clips": len(lengths),
        "frames": int(lengths.sum()),
        "hours": float((lengths / fps).sum() / 3600),
        "grid": list(meta.grid),
        "codebook_size": meta.codebook_size,
        "frame_tokenizer": meta.tokenizer_fingerprint,
        "decoder": sorted({shard.meta.decoder for shard in readers}),
        "settings": [parsed_settings(settings) for settings in sorted({shard.meta.settings for shard in readers})],
        "frames_per_clip": _distribution(lengths),
        "seconds_per_clip": _distribution(lengths / fps),
        "fps": {f"{rate:g}": count for rate, count in sorted(Counter(np.round(fps, 3).tolist()).items())},
        "caption_characters": _distribution(captions),
        "token_ids": _token_ids(readers),
        "codes": code_usage(shards, code_frames),
    }


def _token_ids(readers: Sequence[Shard]) -> list[dict[str, Any]]:
    """Returns, for each text tokenizer that made token ids, its fingerprint and the ids per clip."""
    lengths: dict[str, list[int]] = {}
    for shard in readers:
        if shard.text_tokenizer is not None:
            lengths.setdefault(shard.text_tokenizer, []).extend(
                len(shard.token_ids(clip)) for clip in range(shard.num_clips)
            )
    return [
        {"text_tokenizer": fingerprint, "per_clip": _distribution(np.asarray(counts, dtype=np.int64))}
        for fingerprint, counts in sorted(lengths.items())
    ]


def code_usage(shards: ShardSet, code_frames: int = 0) -> dict[str, Any]:
    """Returns how many codes are used and their perplexity (2 to the entropy; codebook_size = all alike).

    Args:
        shards: the set.
        code_frames: about how many frames to look at, every k-th of the set; 0 = all.
    """
    size = shards.shards[0].meta.codebook_size
    total = sum(int(shard.num_frames.sum()) for shard in shards.shards)
    stride = max(1, total // code_frames) if code_frames else 1
    counts = np.zeros(size, dtype=np.int64)
    seen = offset = 0
    for shard in shards.shards:
        for clip, length in enumerate(shard.num_frames.tolist()):
            wanted = range(-offset % stride, length, stride)
            for first in range(0, len(wanted), _BLOCK_FRAMES):
                codes = shard.read(clip, wanted[first : first + _BLOCK_FRAMES])
                counts += np.bincount(codes.ravel(), minlength=size)
            seen += len(wanted)
            offset += length
    share = counts[counts > 0] / max(int(counts.sum()), 1)
    return {
        "frames_counted": seen,
        "used": int((counts > 0).sum()),
        "perplexity": float(np.exp2(-(share * np.log2(share)).sum())),
    }


def describe(figures: dict[str, Any]) -> str:
    """Returns the figures of `statistics` as lines for people."""
    codes, size = figures["codes"], figures["codebook_size"]
    lines = [
        f"{figures['clips']} clips, {figures['frames']} frames, {figures['hours']:.3f} hours in "
        f"{figures['shards']} shards, {figures['bytes'] / 1e6:.2f} MB",
        f"grid {figures['grid'][0]} x {figures['grid'][1]}, codebook {size}, frame tokenizer "
        f"{figures['frame_tokenizer'][:16]}",
        *(f"decoder {decoder}" for decoder in figures["decoder"]),
        *(f"settings {json.dumps(settings)}" for settings in figures["settings"]),
        f"codes used {codes['used']} of {size} ({100 * codes['used'] / size:.1f}%), perplexity "
        f"{codes['perplexity']:.1f}, over {codes['frames_counted']} frames",
        *_histogram("frames per clip", figures["frames_per_clip"]),
        *_histogram("seconds per clip", figures["seconds_per_clip"]),
        *_histogram("caption characters", figures["caption_characters"]),
        *(
            line
            for made in figures["token_ids"]
            for line in _histogram(f"token ids of text tokenizer {made['text_tokenizer'][:16]}", made["per_clip"])
        ),
        "stored frames per second",
        *_bars([(rate, count) for rate, count in figures["fps"].items()]),
    ]
    return "\n".join(lines)


def rates(config: Config, patterns: Sequence[str] = ()) -> tuple[list[dict[str, Any]], str]:
    """Returns the clips x rates table of a training config, as dicts and as lines for people.

    Args:
        config: its stage, model shape and `data.rates` make the rule.
        patterns: shards to count; none = the config's `data.train`.
    """
    from megacog.data.check import rate_table
    from megacog.tokenizers.text import span_text

    if patterns:
        train = tuple(SourceConfig(path=pattern) for pattern in patterns)
        config = config.model_copy(update={"data": config.data.model_copy(update={"train": train})})
    rows = rate_table(config)
    cells = [("from step", "fps", "seconds", "clips", "share")]
    for row in rows:
        fps = f"{row.fps:g}" if row.fps else ("-" if row.share else "none fits")
        span = span_text(row.span_seconds) if row.span_seconds else "-"
        cells.append((str(row.from_step), fps, span, str(row.clips), f"{100 * row.share:.1f}%"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    title = f"clips x rates, stage {config.train.stage}"
    lines = ["  " + "  ".join(map(str.rjust, line, widths)) for line in cells]
    return [asdict(row) for row in rows], "\n".join([title, *lines])


def default_patterns(config: Config) -> list[str]:
    """Returns the training shards that a config names.

    Raises:
        DataError: it names none.
    """
    patterns = [source.path for source in config.data.train]
    if not patterns:
        raise DataError("the config's data.train is empty; name the shards to inspect")
    return patterns


def parsed_settings(settings: str) -> Any:
    """Returns the settings of a shard's preparation as values, or as they are if they are no JSON."""
    try:
        return json.loads(settings)
    except (ValueError, RecursionError):
        return settings


def _distribution(values: NDArray[Any]) -> dict[str, Any]:
    if not len(values):
        return {"min": None, "median": None, "mean": None, "max": None, "edges": [], "counts": []}
    low, high = float(values.min()), float(values.max())
    whole = values.dtype.kind in "iu"
    edges: NDArray[Any]
    if whole:
        step = max(1, -(-int(high - low + 1) // _BINS))
        edges = np.arange(int(low), int(high) + step + 1, step, dtype=np.int64)
    else:
        edges = np.linspace(low, high, _BINS + 1) if high > low else np.asarray([low, low])
    counts = (
        np.histogram(values, bins=edges)[0] if len(set(edges.tolist())) > 1 else np.asarray([len(values)])
    )
    return {
        "min": values.min().item(),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": values.max().item(),
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def _histogram(title: str, figures: dict[str, Any]) -> list[str]:
    if not figures["counts"]:
        return [f"{title}: none"]
    summary = ", ".join(f"{name} {figures[name]:.4g}" for name in ("min", "median", "mean", "max"))
    edges = figures["edges"]
    whole = isinstance(edges[0], int)
    rows = []
    for low, high, count in zip(edges, edges[1:], figures["counts"], strict=False):
        label = (f"{low}" if high - low == 1 else f"{low}-{high - 1}") if whole else f"{low:.2f}-{high:.2f}"
        rows.append((label, count))
    return [f"{title}: {summary}", *_bars(rows)]


def _bars(rows: Sequence[tuple[str, int]]) -> list[str]:
    width = max(len(label) for label, _ in rows)
    most = max(max(count for _, count in rows), 1)
    return [
        f"  {label:>{width}}  {count:>8}  {'#' * round(_BAR_CHARACTERS * count / most)}".rstrip()
        for label, count in rows
    ]
