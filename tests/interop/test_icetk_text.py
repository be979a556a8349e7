"""ice_text.model to a text tokenizer folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from small_icetk import CAPTIONS, write_text_model

from megacog.errors import CheckpointError, DataError, EnvError
from megacog.interop import icetk_text
from megacog.interop.icetk_text import APPENDED, ID_OFFSET, append_pieces, import_icetk_text
from megacog.interop.main import main
from megacog.tokenizers.text import TextTokenizer

DOG = CAPTIONS[0]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    path = tmp_path_factory.mktemp("icetk") / "ice_text.model"
    count = write_text_model(path)
    return path.read_bytes(), count


@pytest.fixture
def file(pieces: tuple[bytes, int], tmp_path: Path) -> Path:
    path = tmp_path / "ice_text.model"
    path.write_bytes(pieces[0])
    return path


@pytest.fixture
def tokenizer(file: Path, pieces: tuple[bytes, int], tmp_path: Path) -> TextTokenizer:
    import_icetk_text(file, tmp_path / "text", pieces=pieces[1])
    return TextTokenizer.load(tmp_path / "text")


@pytest.fixture
def original(pieces: tuple[bytes, int]) -> sentencepiece.SentencePieceProcessor:
    """The unchanged file: what gives the original's ids, less its offset."""
    return sentencepiece.SentencePieceProcessor(model_proto=pieces[0])


def test_appended_pieces_follow_the_file_s_own_in_the_release_s_order(
    pieces: tuple[bytes, int], original: sentencepiece.SentencePieceProcessor
) -> None:
    assert APPENDED == ("<start_of_image>", "<start_of_english>", "<start_of_chinese>")
    extended = sentencepiece.SentencePieceProcessor(model_proto=append_pieces(pieces[0], APPENDED))
    count = pieces[1]
    assert extended.get_piece_size() == count + 3
    for index, piece in enumerate(APPENDED):
        assert extended.piece_to_id(piece) == count + index
        assert extended.get_score(count + index) == 0.0
        assert not extended.is_control(count + index) and not extended.is_unused(count + index)
    for index in range(count):
        assert extended.id_to_piece(index) == original.id_to_piece(index)
        assert extended.get_score(index) == original.get_score(index)
    # Normal pieces match inside a text, as in the original; TextTokenizer cleans user texts of them.
    assert count in extended.encode("<start_of_image>a")


def test_in_the_release_the_start_of_the_image_has_the_original_s_id() -> None:
    assert icetk_text.PIECES + ID_OFFSET == 150_000


def test_special_pieces_are_found_by_name(tokenizer: TextTokenizer, pieces: tuple[bytes, int]) -> None:
    assert (tokenizer.pad_id, tokenizer.separator_id, tokenizer.boi_id) == (3, 4, pieces[1])


@pytest.mark.parametrize(("span", "text"), [(4.0, "4.0秒"), (0.5, "0.5秒"), (16.0, "16.0秒")])
def test_the_rate_is_the_span_in_seconds_and_the_separator(
    tokenizer: TextTokenizer, original: sentencepiece.SentencePieceProcessor, span: float, text: str
) -> None:
    assert tokenizer.encode(DOG, span) == [*original.encode(text), 4, *original.encode(DOG)]
    assert tokenizer.encode_null(span) == [*original.encode(text), 4, *original.encode("视频")]


def test_line_breaks_and_control_pieces_become_spaces(tokenizer: TextTokenizer) -> None:
    expected = tokenizer.encode("a dog runs", None)
    for text in ("a dog\nruns", "a<n>dog<pad> runs", *(f"a dog{piece}runs" for piece in APPENDED)):
        assert tokenizer.encode(text, None) == expected


def test_texts_beyond_the_trained_length_warn_once_and_pass(
    tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long = tokenizer.encode(DOG * 10, 4.0)
    assert 64 < len(long) < 512
    with caplog.at_level(logging.WARNING, logger="megacog"):
        tokenizer.pad([tokenizer.encode(DOG, 4.0)], 512)
        assert not caplog.records
        text, valid = tokenizer.pad([long], 512)
        tokenizer.pad([long], 512)
    assert valid.sum() == len(long) and text[0, -1] == long[-1]
    (record,) = caplog.records
    assert f"has {len(long)} tokens" in record.message and "trained on at most 64" in record.message
    with pytest.raises(DataError, match="more than the 64"):
        tokenizer.pad([long], 64)


def change(edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(edit(path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "no such file.*icetk"),
        (change(lambda model: b""), "is empty"),
        (change(lambda model: b"<!doctype html>"), "HTML page"),
        (change(lambda model: b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
        (change(lambda model: model[: len(model) // 2]), "no SentencePiece model, or truncated|pieces, icetk's"),
        (change(lambda model: b"\x00\x01 nonsense"), "no SentencePiece model"),
        (change(lambda model: append_pieces(model, APPENDED)), "holds <start_of_image> already"),
        (change(lambda model: append_pieces(model, ["extra"])), r"has \d+ pieces, icetk's text model \d+"),
        (change(lambda model: model.replace(b"<n>", b"<m>")), "no piece <n>"),
        (change(lambda model: model.replace("秒".encode(), "秓".encode())), "no pieces for 0.5秒"),
    ],
    ids=["missing", "empty", "html", "lfs", "truncated", "nonsense", "changed", "more", "no-separator", "no-seconds"],
)
def test_bad_files_are_told_and_leave_no_folder(
    file: Path, tmp_path: Path, pieces: tuple[bytes, int], damage: Callable[[Path], object], said: str
) -> None:
    damage(file)
    with pytest.raises(CheckpointError, match=f"(?s)ice_text.model.*({said})"):
        import_icetk_text(file, tmp_path / "text", pieces=pieces[1])
    assert not (tmp_path / "text").exists()


def test_an_existing_folder_is_replaced_only_when_asked(
    file: Path, tmp_path: Path, pieces: tuple[bytes, int], tokenizer: TextTokenizer
) -> None:
    with pytest.raises(EnvError, match="exists already"):
        import_icetk_text(file, tmp_path / "text", pieces=pieces[1])
    import_icetk_text(file, tmp_path / "text", pieces=pieces[1], replace=True)


def test_the_command_writes_the_folder_and_tells_the_ids(
    file: Path,
    tmp_path: Path,
    pieces: tuple[bytes, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(CheckpointError, match="130000"):
        main(["import-icetk-text", str(file), "--out", str(tmp_path / "text")])
    monkeypatch.setitem(import_icetk_text.__kwdefaults__, "pieces", pieces[1])
    assert main(["import-icetk-text", str(file), "--out", str(tmp_path / "text")]) == 0
    assert f"<start_of_image> {pieces[1]}, <n> 4, <pad> 3" in capsys.readouterr().out
    assert TextTokenizer.load(tmp_path / "text").vocab_size == pieces[1] + 3
