"""`convert.py import-icetk-text`: icetk's vocabulary `ice_text.model` to a text tokenizer folder.

Ids here are piece ids. The original counts the image codes first, so that its ids are larger by 20000.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from megacog.errors import CheckpointError
from megacog.interop.torch_files import require_no_stand_in
from megacog.runtime.files import atomic_directory
from megacog.tokenizers.text import (
    KIND,
    LANGUAGE_STARTS,
    START_OF_IMAGE,
    TextSettings,
    TextTokenizer,
    rate_text,
    write_tokenizer,
)

WHERE = (
    "ice_text.model belongs to icetk, the tokenizer of CogView2 and CogVideo: icetk downloads it to "
    "~/.icetk_models/ice_text.model when it first codes a text; https://github.com/THUDM/icetk has the link "
    "(icetk/utils.py)."
)
PIECES = 130_000
"""Of the released file; the rows of the model's text embedding follow from it."""
ID_OFFSET = 20_000
"""What the original adds to a piece id: its image codes come first."""
APPENDED = (START_OF_IMAGE, *LANGUAGE_STARTS)
"""Pieces that CogVideo appends to the file's, in this order."""
# The words that the release was trained and guided with: "seconds", "video".
SETTINGS = TextSettings(template="{span}秒", separator="<n>", null_caption="视频", trained_length=64)
_SPANS = (0.5, 1.0, 2.0, *map(float, range(3, 17)))
_PIECES_FIELD, _PIECE_FIELD, _SCORE_FIELD, _TYPE_FIELD, _NORMAL = 0x0A, 0x0A, 0x15, 0x18, 1


def import_icetk_text(
    path: Path, out: Path, settings: TextSettings = SETTINGS, *, pieces: int = PIECES, replace: bool = False
) -> TextTokenizer:
    """Returns the text tokenizer after writing it to the folder `out` (atomically).

    Args:
        path: `ice_text.model`.
        out: folder to make.
        settings: rate template, separator, null caption, trained length.
        pieces: that the file must hold.
        replace: overwrite an existing text tokenizer.

    Raises:
        CheckpointError: the file is missing, damaged, something else, or another vocabulary.
        EnvError: `out` exists, or the disk is full.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file. {WHERE}")
    require_no_stand_in(path, "icetk's text model")
    model = path.read_bytes()
    _require_vocabulary(path, model, settings, pieces)
    extended = append_pieces(model, APPENDED)
    tokenizer = TextTokenizer(extended, settings)
    _require_words(path, tokenizer)
    with atomic_directory(out, KIND if replace else None) as folder:
        write_tokenizer(folder, extended, settings)
    return tokenizer


def append_pieces(model: bytes, pieces: Sequence[str]) -> bytes:
    """Returns the serialized SentencePiece model with normal pieces of score 0 behind its own.

    A protobuf message followed by another one of its type is their merge, in which repeated fields are joined:
    field 1 of the model is the list of pieces; of a piece 1 is the text, 2 the score, 3 the type
    (https://protobuf.dev/programming-guides/encoding, sentencepiece_model.proto).
    """
    for piece in pieces:
        text = piece.encode()
        fields = bytes([_PIECE_FIELD, len(text)]) + text + bytes([_SCORE_FIELD]) + struct.pack("<f", 0.0)
        fields += bytes([_TYPE_FIELD, _NORMAL])
        if len(fields) > 127:
            raise ValueError(f"piece {piece!r} is too long: its length must fit into one byte")
        model += bytes([_PIECES_FIELD, len(fields)]) + fields
    return model


def _require_vocabulary(path: Path, model: bytes, settings: TextSettings, pieces: int) -> None:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} is no SentencePiece model, or truncated ({error}). Download it again. {WHERE}"
        ) from error
    known = {piece: processor.piece_to_id(piece) for piece in (settings.separator, "<pad>", *APPENDED)}
    if present := [piece for piece in APPENDED if known[piece] != processor.unk_id()]:
        raise CheckpointError(f"{path} holds {present[0]} already: it was changed. Use the file as released. {WHERE}")
    if missing := [piece for piece in known if piece not in APPENDED and known[piece] == processor.unk_id()]:
        raise CheckpointError(f"{path} has no piece {missing[0]}, so it is another vocabulary. {WHERE}")
    if processor.get_piece_size() != pieces:
        raise CheckpointError(
            f"{path} has {processor.get_piece_size()} pieces, icetk's text model {pieces}: it is another vocabulary, "
            f"and its ids would mean other rows of the model. {WHERE}"
        )


def _require_words(path: Path, tokenizer: TextTokenizer) -> None:
    """Checks that the texts in front of every caption, and the null text, consist of known pieces."""
    for span in _SPANS:
        if tokenizer.unk_id in tokenizer.encode_null(span):
            text = f"{rate_text(tokenizer.settings.template, span)} / {tokenizer.settings.null_caption}"
            raise CheckpointError(f"{path} has no pieces for {text}, so it is another vocabulary. {WHERE}")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the sub-command."""
    parser = commands.add_parser(
        "import-icetk-text",
        help="icetk's vocabulary -> text tokenizer folder",
        description=f"Make a text tokenizer folder from icetk's text model. {WHERE}",
    )
    parser.add_argument("file", type=Path, help="ice_text.model")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument("--force", action="store_true", help="replace an existing text tokenizer")
    parser.set_defaults(command=_command)


def _command(options: argparse.Namespace) -> int:
    tokenizer = import_icetk_text(options.file, options.out, replace=options.force)
    print(
        f"text tokenizer in {options.out}: {tokenizer.vocab_size} pieces, <start_of_image> {tokenizer.boi_id}, "
        f"<n> {tokenizer.separator_id}, <pad> {tokenizer.pad_id} (the original's ids: {ID_OFFSET} more), rate text "
        f"{rate_text(tokenizer.settings.template, 4.0)} <n>, fingerprint {tokenizer.fingerprint[:16]}"
    )
    return 0
