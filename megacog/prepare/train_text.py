"""`train_tokenizer.py text`: caption files to a text tokenizer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from megacog.errors import DataError
from megacog.prepare.sources import read_source
from megacog.tokenizers.text import DEFAULT_NULL_CAPTION, DEFAULT_TEMPLATE, train_text_tokenizer


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the sub-command."""
    parser = commands.add_parser("text", help="train a SentencePiece tokenizer on captions")
    parser.add_argument("captions", type=Path, nargs="+", help="csv, tsv or jsonl files with captions")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--vocab-size", type=int, default=8192, help="most pieces; fewer on small corpora (default: %(default)s)"
    )
    parser.add_argument(
        "--template",
        default=DEFAULT_TEMPLATE,
        help="rate text with {span} (seconds) or {fps}, e.g. '{span}s' (default: %(default)s)",
    )
    parser.add_argument(
        "--null-caption",
        default=DEFAULT_NULL_CAPTION,
        help="caption of the unconditional text (default: %(default)s)",
    )
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: %(default)s")
    parser.add_argument(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        help="spell unknown characters as bytes, 256 pieces (default: from 1024 pieces on)",
    )
    parser.add_argument("--video-column", help="name of the column with the video, where it is unusual")
    parser.add_argument("--caption-column", help="name of the column with the caption, where it is unusual")
    parser.add_argument("--force", action="store_true", help="replace an existing text tokenizer")
    parser.set_defaults(command=train)


def train(settings: argparse.Namespace) -> int:
    """Trains and prints the report; returns the exit code."""
    report = train_text_tokenizer(
        _captions(settings.captions, settings.video_column, settings.caption_column),
        settings.out,
        settings.vocab_size,
        settings.template,
        settings.null_caption,
        model_type=settings.model_type,
        byte_fallback=settings.byte_fallback,
        replace=settings.force,
    )
    lengths = report["tokens_per_caption"]
    print(
        f"text tokenizer in {settings.out}: {report['vocab_size']} pieces, {lengths['mean']} tokens per caption "
        f"(at most {lengths['max']}, and {report['tokens_per_rate_text']} + 1 for the rate), "
        f"unknown {100 * report['unk_rate']:.3f} %"
    )
    return 0


def _captions(paths: Sequence[Path], video_column: str | None, caption_column: str | None) -> Iterator[str]:
    """Yields the captions of all files.

    Raises:
        DataError: a row is bad; the message names its line.
    """
    for path in paths:
        source = read_source(path, video_column, caption_column, allow_absolute=True)
        if source.failures:
            first = source.failures[0]
            more = f" ({len(source.failures)} bad rows in all)" if len(source.failures) > 1 else ""
            raise DataError(f"{path}:{first.line}: {first.reason}{more}; mend or remove the row")
        for row in source.rows:
            yield row.caption
