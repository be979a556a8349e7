"""Text tokens of a clip: the frame rate in words, a separator, the caption.

A text tokenizer is a folder with `text.model` (SentencePiece) and `text.json`. The rate is the
span in seconds from the first to the last frame of the sequence, written by a template such as
"{span}s" and tokenized like any other text: "4.0s" <n> "the digit 3 moves right".

Dimensions: B batch, L text length.
"""

from __future__ import annotations

import hashlib
import io
import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from megacog.errors import ConfigError, DataError
from megacog.runtime.files import FolderKind, atomic_directory, require_place
from megacog.runtime.log import get_logger
from megacog.tokenizers.description import read_description

FORMAT = "megacog-text-tokenizer"
KIND = FolderKind("text.json", FORMAT)
VERSION = 1
SEPARATOR = "<n>"
PAD = "<pad>"
START_OF_IMAGE = "<start_of_image>"
SPECIAL_PIECES = (SEPARATOR, PAD, START_OF_IMAGE)
# In vocabularies of icetk only; no model here reads them.
LANGUAGE_STARTS = ("<start_of_english>", "<start_of_chinese>")
# "4.0 seconds" as the released Chinese model reads it.
DEFAULT_TEMPLATE = "{span}\u79d2"
DEFAULT_NULL_CAPTION = "video"
# A byte needs a piece each; below this many pieces 256 of them would leave too few for words.
BYTE_FALLBACK_FROM = 1024
# The spans of 5 frames at 0.25 to 8 fps, and others that stored rates give rise to.
TYPICAL_SPANS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 0.3, 0.7, 1.5, 3.0, 5.0, 6.0, 7.5, 9.9)
# Captions beyond this many are sampled by SentencePiece with a fixed seed.
MAX_TRAINING_CAPTIONS = 2_000_000
TRAINING_SEED = 20220529
logger = get_logger(__name__)


@dataclass(frozen=True)
class TextSettings:
    """What turns a caption and a rate into the text that is tokenized."""

    template: str = DEFAULT_TEMPLATE
    """Rate text; `{span}` = seconds with one decimal, `{fps}` = frames per second."""
    separator: str = SEPARATOR
    """Piece between the rate text and the caption."""
    null_caption: str = DEFAULT_NULL_CAPTION
    """Caption of the unconditional text (caption dropout, guidance)."""
    trained_length: int | None = None
    """Longest text, in tokens, that inherited weights were trained on; None = not known."""


def rate_text(template: str, span_seconds: float, num_frames: int = 5) -> str:
    """Returns the template filled in for a sequence of `num_frames` frames over `span_seconds`.

    Raises:
        DataError: the span is not a positive number.
    """
    if not 0 < span_seconds < float("inf"):
        raise DataError(f"a clip cannot span {span_seconds} seconds; the span must be positive")
    fps = (num_frames - 1) / span_seconds
    return template.format(span=span_text(span_seconds), fps=f"{fps:g}")


def span_text(span_seconds: float) -> str:
    """Returns a span as texts write it, with one decimal."""
    return f"{span_seconds:.1f}"


def check_template(template: str) -> None:
    """Raises ConfigError unless the template formats `{span}` or `{fps}`, and nothing else."""
    try:
        slow, fast = rate_text(template, 4.0), rate_text(template, 2.0)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"rate template {template!r} cannot be formatted ({error!r}); it may use {{span}} and {{fps}} only"
        ) from error
    if slow == fast:
        raise ConfigError(
            f"rate template {template!r} never mentions the rate; use {{span}} or {{fps}}, e.g. '{{span}}s'"
        )


class TextTokenizer:
    """Captions and rates to SentencePiece ids.

    Args:
        model: serialized SentencePiece model.
        settings: rate template, separator, null caption.
    """

    def __init__(self, model: bytes, settings: TextSettings) -> None:
        check_template(settings.template)
        self.settings = settings
        self.fingerprint = _fingerprint(model, settings)
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"the SentencePiece model cannot be read ({error})") from error
        self.vocab_size: int = self._pieces.get_piece_size()
        self.unk_id: int = self._pieces.unk_id()
        self.pad_id = self._special(PAD)
        self.boi_id = self._special(START_OF_IMAGE)
        self.separator_id = self._special(settings.separator)
        self._warned = False

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Returns the tokenizer stored in `folder`.

        Raises:
            DataError: a file is missing, damaged, or does not match its fingerprint.
        """
        folder = Path(folder)
        fields = read_description(folder / "text.json", "text")
        if fields.get("format") != FORMAT or fields.get("version") != VERSION:
            raise DataError(
                f"{folder / 'text.json'}: format {fields.get('format')!r} version {fields.get('version')!r}, "
                f"expected {FORMAT!r} version {VERSION}; train it with launch/train_tokenizer.py text, or import "
                "icetk's with launch/convert.py import-icetk-text"
            )
        try:
            settings = TextSettings(
                fields["template"], fields["separator"], fields["null_caption"], fields.get("trained_length")
            )
            model = (folder / "text.model").read_bytes()
        except KeyError as error:
            path = folder / "text.json"
            raise DataError(f"{path}: field {error} is missing; the file is damaged") from error
        except OSError as error:
            path = folder / "text.model"
            raise DataError(f"{path}: {error.strerror}; a text tokenizer has two files") from error
        if _fingerprint(model, settings) != fields.get("fingerprint"):
            raise DataError(
                f"{folder}: text.model and text.json do not match the recorded fingerprint; one of them "
                "was changed or damaged. Copy both again or retrain"
            )
        try:
            return cls(model, settings)
        except DataError as error:
            raise DataError(f"{folder / 'text.model'}: {error}") from error

    def encode(self, caption: str, span_seconds: float | None, num_frames: int = 5) -> list[int]:
        """Returns the ids of rate text + separator + caption, or of the caption alone if the span is None.

        Args:
            caption: any text; line breaks and special pieces written in it become spaces.
            span_seconds: seconds from the first to the last of the sequence's frames.
            num_frames: frames of the sequence, for templates with `{fps}`.

        Raises:
            DataError: the caption is empty or not valid Unicode.
        """
        caption_ids = self._encode_caption(caption)
        if span_seconds is None:
            return caption_ids
        rate = self._pieces.encode(rate_text(self.settings.template, span_seconds, num_frames))
        return [*rate, self.separator_id, *caption_ids]

    def encode_null(self, span_seconds: float | None, num_frames: int = 5) -> list[int]:
        """Returns the ids of the unconditional text at the same rate."""
        return self.encode(self.settings.null_caption, span_seconds, num_frames)

    def require_null_fits(self, spans: Iterable[float | None], num_frames: int, length: int) -> None:
        """Checks the unconditional text at every span.

        Raises:
            DataError: it has more than `length` tokens somewhere.
        """
        for span in spans:
            need = len(self.encode_null(span, num_frames))
            if need > length:
                rate = "" if span is None else f" at {span:g} seconds (rate text, separator, null caption)"
                raise DataError(
                    f"the null text{rate} has {need} tokens, model.text_length is {length}. Raise model.text_length; "
                    "with a model that is trained already, choose other generation.seconds or generation.levels"
                )

    def pad(self, ids: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
        """Returns (text_BL int64, text_valid_BL bool), padded on the left to `length`.

        Warns once of texts longer than inherited weights were trained on.

        Raises:
            DataError: a text has more than `length` tokens.
        """
        text_BL = torch.full((len(ids), length), self.pad_id, dtype=torch.int64)
        valid_BL = torch.zeros((len(ids), length), dtype=torch.bool)
        for row, tokens in enumerate(ids):
            if len(tokens) > length:
                shown = textwrap.shorten(self.decode(tokens), 80, placeholder=" ...")
                raise DataError(
                    f"text {shown!r} has {len(tokens)} tokens, more than the {length} that "
                    "the model reads (model.text_length); shorten the caption"
                )
            self._warn_of_untrained_length(tokens)
            if tokens:
                text_BL[row, length - len(tokens) :] = torch.tensor(tokens, dtype=torch.int64)
                valid_BL[row, length - len(tokens) :] = True
        return text_BL, valid_BL

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special pieces included; for messages and logs."""
        return self._pieces.decode([int(token) for token in ids])

    def _encode_caption(self, caption: str) -> list[int]:
        try:
            caption.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"caption {caption!r} is not valid Unicode ({error.reason}); save the file as UTF-8"
            ) from error
        cleaned = caption.replace("\n", " ")
        # User text must never produce a control token such as the start of an image.
        for piece in {*SPECIAL_PIECES, *LANGUAGE_STARTS, self.settings.separator}:
            cleaned = cleaned.replace(piece, " ")
        tokens = self._pieces.encode(cleaned)
        if not tokens:
            raise DataError(f"caption {caption!r} is empty; every clip and prompt needs a text")
        return tokens

    def _warn_of_untrained_length(self, tokens: Sequence[int]) -> None:
        trained = self.settings.trained_length
        if trained is None or len(tokens) <= trained or self._warned:
            return
        self._warned = True
        shown = textwrap.shorten(self.decode(tokens), 80, placeholder=" ...")
        logger.warning(
            "text %r has %d tokens; the inherited weights were trained on at most %d, so the positions beyond are "
            "new to them (said once)",
            shown,
            len(tokens),
            trained,
        )

    def _special(self, piece: str) -> int:
        token = self._pieces.piece_to_id(piece)
        if token == self.unk_id:
            raise DataError(f"the SentencePiece model has no piece {piece!r}, which megacog needs")
        return token


def train_text_tokenizer(
    captions: Iterable[str],
    out: Path,
    vocab_size: int,
    template: str = DEFAULT_TEMPLATE,
    null_caption: str = DEFAULT_NULL_CAPTION,
    *,
    model_type: str = "bpe",
    byte_fallback: bool | None = None,
    spans: Sequence[float] = TYPICAL_SPANS,
    replace: bool = False,
) -> dict[str, Any]:
    """Returns a report after training a tokenizer into the folder `out` (atomically).

    Rate texts and the null caption join the corpus, and their characters always get pieces. A corpus
    that is too small for `vocab_size` gives fewer pieces (the report says how many). Equal captions
    in equal order give equal bytes.

    Args:
        captions: training texts; read once.
        out: folder to make.
        vocab_size: most pieces to make, special pieces included.
        template: rate text, see `TextSettings`.
        null_caption: caption of the unconditional text.
        model_type: SentencePiece's "bpe" or "unigram" (bpe keeps whole words on corpora of few captions).
        byte_fallback: spell unknown characters as bytes; None = from 1024 pieces on.
        spans: seconds whose rate texts are part of the corpus.
        replace: overwrite an existing text tokenizer.

    Raises:
        ConfigError: bad template or vocabulary size.
        DataError: no captions, an empty one, or `out` exists.
    """
    settings = TextSettings(template, SEPARATOR, null_caption)
    check_template(template)
    out = Path(out)
    require_place(out, KIND, replace)
    texts = list(_checked(captions))
    if not texts:
        raise DataError("there are no captions to train a text tokenizer on")
    rates = [rate_text(template, span) for span in spans]
    if byte_fallback is None:
        byte_fallback = vocab_size >= BYTE_FALLBACK_FROM
    model = _train_model(
        [*texts, *rates, null_caption],
        vocab_size,
        model_type,
        byte_fallback,
        required=set("".join(rates) + null_caption + "0123456789.") - set(" "),
    )
    tokenizer = TextTokenizer(model, settings)
    report = _report(tokenizer, texts, rates, vocab_size)
    with atomic_directory(out, KIND if replace else None) as folder:
        write_tokenizer(folder, model, settings)
        _write_json(folder / "report.json", report)
    return report


def write_tokenizer(folder: Path, model: bytes, settings: TextSettings) -> None:
    """Writes `text.model` and `text.json` into an existing folder (the caller makes it atomic)."""
    (folder / "text.model").write_bytes(model)
    fields = {"format": FORMAT, "version": VERSION, **asdict(settings)}
    _write_json(folder / "text.json", {**fields, "fingerprint": _fingerprint(model, settings)})


def _checked(captions: Iterable[str]) -> Iterator[str]:
    for number, caption in enumerate(captions, 1):
        if not caption.strip():
            raise DataError(f"caption {number} is empty; every clip needs a text")
        for piece in SPECIAL_PIECES:
            caption = caption.replace(piece, " ")
        yield caption


def _train_model(
    texts: Sequence[str], vocab_size: int, model_type: str, byte_fallback: bool, required: set[str]
) -> bytes:
    """Returns a serialized SentencePiece model."""
    buffer = io.BytesIO()
    sentencepiece.set_random_generator_seed(TRAINING_SEED)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=buffer,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=byte_fallback,
            split_digits=True,
            # Small corpora keep every character; large multilingual ones drop the rarest.
            character_coverage=1.0 if len(texts) < 100_000 else 0.9998,
            required_chars="".join(sorted(required)),
            user_defined_symbols=list(SPECIAL_PIECES),
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            input_sentence_size=MAX_TRAINING_CAPTIONS,
            shuffle_input_sentence=len(texts) > MAX_TRAINING_CAPTIONS,
            # Sums over threads differ with their number: a fixed one keeps the result the same everywhere.
            num_threads=1 if len(texts) < 100_000 else 8,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"SentencePiece cannot train {model_type} with vocab_size {vocab_size} and byte_fallback "
            f"{byte_fallback} on {len(texts)} texts ({error}); "
            "give more pieces (byte fallback needs 256 of its own)"
        ) from error
    return buffer.getvalue()


def _report(tokenizer: TextTokenizer, texts: Sequence[str], rates: Sequence[str], vocab_size: int) -> dict[str, Any]:
    lengths, unknown, total = [], 0, 0
    for text in texts:
        ids = tokenizer.encode(text, None)
        lengths.append(len(ids))
        unknown += ids.count(tokenizer.unk_id)
        total += len(ids)
    lengths.sort()
    rate_lengths = [len(tokenizer._pieces.encode(rate)) for rate in rates]
    return {
        "captions": len(texts),
        "vocab_size": tokenizer.vocab_size,
        "requested_vocab_size": vocab_size,
        "unk_rate": unknown / total,
        "tokens_per_caption": {
            "mean": round(total / len(texts), 2),
            "median": lengths[len(lengths) // 2],
            "p99": lengths[int(0.99 * (len(lengths) - 1))],
            "max": lengths[-1],
        },
        "tokens_per_rate_text": max(rate_lengths),
        "fingerprint": tokenizer.fingerprint,
    }


def _fingerprint(model: bytes, settings: TextSettings) -> str:
    """Returns the sha256 over the model and all settings, as hex; what is None counts as not there."""
    known = {name: value for name, value in asdict(settings).items() if value is not None}
    fields = {"format": FORMAT, "version": VERSION, **known}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    digest.update(hashlib.sha256(model).digest())
    return digest.hexdigest()


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
