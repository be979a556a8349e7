from __future__ import annotations

import json
from pathlib import Path

import pytest

from megacog.errors import ConfigError, DataError
from megacog.prepare.digits import captions
from megacog.tokenizers.text import TextTokenizer, rate_text, train_text_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text") / "tokenizer"
    train_text_tokenizer(captions(), out, 128, template="{span}s", null_caption="a clip")
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return TextTokenizer.load(folder)


def test_text_is_rate_then_separator_then_caption(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("the digit 3 moves right", 4.0)
    cut = ids.index(tokenizer.separator_id)
    assert tokenizer.decode(ids[:cut]) == "4.0s"
    assert tokenizer.decode(ids[cut + 1 :]) == "the digit 3 moves right"
    assert ids[cut + 1 :] == tokenizer.encode("the digit 3 moves right", None)


def test_null_text_keeps_the_rate(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode_null(0.5) == tokenizer.encode("a clip", 0.5)
    assert tokenizer.encode_null(None) == tokenizer.encode("a clip", None)
    assert tokenizer.encode_null(0.5) != tokenizer.encode_null(1.0)


@pytest.mark.parametrize("vocab_size", [64, 128])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_forty_captions_train_without_unknown_pieces(tmp_path: Path, vocab_size: int, model_type: str) -> None:
    report = train_text_tokenizer(captions(), tmp_path / "t", vocab_size, model_type=model_type)
    assert report["unk_rate"] == 0.0
    assert report["vocab_size"] <= vocab_size
    tokenizer = TextTokenizer.load(tmp_path / "t")
    for span in (0.5, 1.0, 4.0, 16.0, 3.7, 2.8):
        assert tokenizer.unk_id not in tokenizer.encode("the digit 9 moves up", span)
    assert tokenizer.unk_id not in tokenizer.encode_null(4.0)


def test_digits_are_pieces_of_their_own(tokenizer: TextTokenizer) -> None:
    one, two, both = (tokenizer.encode(text, None) for text in ("1", "2", "12"))
    assert both == [*one, two[-1]]


def test_same_captions_give_the_same_bytes_and_fingerprint(folder: Path, tmp_path: Path) -> None:
    train_text_tokenizer(captions(), tmp_path / "again", 128, template="{span}s", null_caption="a clip")
    for name in ("text.model", "text.json", "report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_fingerprint_covers_the_settings(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    train_text_tokenizer(captions(), tmp_path / "other", 128, template="{span}s", null_caption="a film")
    assert TextTokenizer.load(tmp_path / "other").fingerprint != tokenizer.fingerprint


def test_padding_is_on_the_left(tokenizer: TextTokenizer) -> None:
    short, long = tokenizer.encode("the digit 1 moves up", None), tokenizer.encode("the digit 1 moves up", 2.0)
    text, valid = tokenizer.pad([short, long], 16)
    assert text.shape == valid.shape == (2, 16)
    for row, ids in enumerate((short, long)):
        assert text[row, 16 - len(ids) :].tolist() == ids
        assert text[row, : 16 - len(ids)].eq(tokenizer.pad_id).all()
        assert valid[row].tolist() == [False] * (16 - len(ids)) + [True] * len(ids)


def test_too_long_text_is_named_with_the_limit(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("the digit 3 moves right", 4.0)
    with pytest.raises(DataError, match=rf"the digit 3 moves right.* {len(ids)} tokens.*the {len(ids) - 1} that"):
        tokenizer.pad([ids], len(ids) - 1)


@pytest.mark.parametrize("caption", ["", "   ", "\n", "<n>", "<start_of_image> <pad>"])
def test_empty_caption_is_an_error(tokenizer: TextTokenizer, caption: str) -> None:
    with pytest.raises(DataError, match="is empty"):
        tokenizer.encode(caption, 4.0)


def test_special_pieces_in_a_caption_do_not_become_control_tokens(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("the digit<n>1 <start_of_image><pad> moves up", None)
    assert ids == tokenizer.encode("the digit 1 moves up", None)


def test_caption_that_is_not_unicode_is_an_error(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match="not valid Unicode"):
        tokenizer.encode("bad \udcff byte", 4.0)


def test_byte_fallback_spells_unknown_characters(tmp_path: Path) -> None:
    train_text_tokenizer(captions(), tmp_path / "t", 512, byte_fallback=True)
    tokenizer = TextTokenizer.load(tmp_path / "t")
    ids = tokenizer.encode("\u00e9t\u00e9 \u732b", None)
    assert tokenizer.unk_id not in ids and tokenizer.decode(ids) == "\u00e9t\u00e9 \u732b"


def test_rate_template_formats_span_and_fps() -> None:
    assert rate_text("{span}s", 4.0) == "4.0s"
    assert rate_text("{fps} fps", 2.0) == "2 fps"
    assert rate_text("{fps}", 1.0, num_frames=9) == "8"
    with pytest.raises(DataError, match="positive"):
        rate_text("{span}s", 0.0)


@pytest.mark.parametrize("template", ["{speed}", "{span", "{}", "no rate"])
def test_bad_template_is_an_error(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match="rate template"):
        train_text_tokenizer(captions(), tmp_path / "t", 128, template=template)
    assert not list(tmp_path.iterdir())


def test_training_errors_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="caption 2 is empty"):
        train_text_tokenizer(["a", " "], tmp_path / "t", 64)
    with pytest.raises(DataError, match="no captions"):
        train_text_tokenizer([], tmp_path / "t", 64)
    with pytest.raises(ConfigError, match="vocab_size 4 "):
        train_text_tokenizer(captions(), tmp_path / "t", 4)
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_replaced_only_on_request(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    train_text_tokenizer(captions(), out, 64)
    before = (out / "text.model").read_bytes()
    with pytest.raises(DataError, match="exists already.*--force"):
        train_text_tokenizer(captions(), out, 128)
    assert (out / "text.model").read_bytes() == before
    train_text_tokenizer(captions(), out, 128, replace=True)
    assert (out / "text.model").read_bytes() != before


def _copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name in ("text.model", "text.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


def test_missing_and_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.*text.json"):
        TextTokenizer.load(tmp_path / "nowhere")
    copy = _copy(folder, tmp_path / "a")
    (copy / "text.model").unlink()
    with pytest.raises(DataError, match="text.model"):
        TextTokenizer.load(copy)
    copy = _copy(folder, tmp_path / "b")
    (copy / "text.model").write_bytes((folder / "text.model").read_bytes()[:-9])
    with pytest.raises(DataError, match="fingerprint"):
        TextTokenizer.load(copy)
    copy = _copy(folder, tmp_path / "c")
    (copy / "text.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        TextTokenizer.load(copy)
    fields = json.loads((folder / "text.json").read_text())
    (copy / "text.json").write_text(json.dumps({**fields, "null_caption": "other"}))
    with pytest.raises(DataError, match="fingerprint"):
        TextTokenizer.load(copy)
    (copy / "text.json").write_text(json.dumps({**fields, "version": 99}))
    with pytest.raises(DataError, match="version 99"):
        TextTokenizer.load(copy)
