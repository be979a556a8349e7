"""The original's token records to shards, and what training reads from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_icetk import CAPTIONS, write_text_model

from megacog.config.schema import Config
from megacog.data.check import check_data
from megacog.data.dataset import StageDataset, open_sources
from megacog.data.shards import Shard
from megacog.errors import ConfigError, DataError
from megacog.interop.icetk_text import import_icetk_text
from megacog.prepare import records
from megacog.prepare.inspect import ShardSet, describe, statistics
from megacog.prepare.main import main
from megacog.prepare.records import RECORD_BYTES, RecordSettings, prepare_records
from megacog.prepare.verify import verify
from megacog.tokenizers.frames import FrameTokenizer, load_frame_tokenizer, write_frame_tokenizer
from megacog.tokenizers.icetk_vqvae import IcetkVqvae, IcetkVqvaeConfig
from megacog.tokenizers.text import TextSettings, TextTokenizer

PAD, SEPARATOR = 20003, 20004


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers of icetk's kind in `text` and `frames`."""
    folder = tmp_path_factory.mktemp("inputs")
    pieces = write_text_model(folder / "ice_text.model")
    import_icetk_text(folder / "ice_text.model", folder / "text", pieces=pieces)
    (folder / "frames").mkdir()
    torch.manual_seed(0)
    write_frame_tokenizer(folder / "frames", IcetkVqvae(IcetkVqvaeConfig(width=32, code_dim=4)))
    return folder


@pytest.fixture(scope="module")
def text(inputs: Path) -> TextTokenizer:
    return TextTokenizer.load(inputs / "text")


@pytest.fixture(scope="module")
def frames(inputs: Path) -> FrameTokenizer:
    return load_frame_tokenizer(inputs / "frames")


def text_field(text: TextTokenizer, caption: str, rate: str, marked: bool = False) -> list[int]:
    """The 64 text ids as the original's tool writes them."""
    rate_ids, caption_ids = ([token + 20000 for token in text.encode(words, None)] for words in (rate, caption))
    ids = [*([PAD] if marked else []), *rate_ids, SEPARATOR, *caption_ids]
    return [*ids, *[PAD] * (64 - len(ids))]


def make_record(text: TextTokenizer, index: int, span: str = "4.0", marked: bool = False) -> np.ndarray:
    codes = np.random.default_rng(index).integers(0, 20000, 2000)
    return np.asarray([*text_field(text, CAPTIONS[index % 5], f"{span}秒", marked), *codes], dtype="<i4")


def write_records(path: Path, rows: list[np.ndarray]) -> Path:
    path.write_bytes(np.stack(rows).astype("<i4").tobytes())
    return path


@pytest.fixture
def file(tmp_path: Path, text: TextTokenizer) -> Path:
    spans = ["4.0", "1.0", "3.0", "16.0", "0.5", "2.0", "7.0"]
    rows = [make_record(text, index, span, marked=index % 2 == 0) for index, span in enumerate(spans)]
    assert rows[0].nbytes == RECORD_BYTES == 8256
    return write_records(tmp_path / "train.bin", rows)


def command(file: Path, inputs: Path, out: Path, *more: str) -> list[str]:
    tokenizers = ["--text", str(inputs / "text"), "--tokenizer", str(inputs / "frames")]
    return ["records", str(file), "--out", str(out), *tokenizers, *more]


def test_records_become_clips_with_their_codes_rates_and_token_ids(
    file: Path,
    tmp_path: Path,
    inputs: Path,
    text: TextTokenizer,
    frames: FrameTokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command(file, inputs, tmp_path / "shards" / "film", "--clips-per-shard", "4", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    paths = sorted((tmp_path / "shards").glob("film-*.h5"))
    assert printed["shards"] == [str(path) for path in paths] and (printed["clips"], printed["frames"]) == (7, 35)
    assert [path.name for path in paths] == ["film-00000-of-00002.h5", "film-00001-of-00002.h5"]
    rows = np.fromfile(file, "<i4").reshape(-1, 2064)
    seen = 0
    for path in paths:
        with Shard(path) as shard:
            assert shard.text_tokenizer == text.fingerprint
            assert shard.meta.tokenizer_fingerprint == frames.fingerprint
            assert (shard.meta.grid, shard.meta.codebook_size) == ((20, 20), 20000)
            for clip in range(shard.num_clips):
                assert np.array_equal(shard.read(clip, slice(None)).ravel(), rows[seen, 64:])
                assert shard.clip_ids[clip] == f"train.bin:{seen}"
                assert shard.captions[clip] == CAPTIONS[seen % 5]
                # The trainer of the original drops every <pad> of a record.
                assert (shard.token_ids(clip) + 20000).tolist() == [i for i in rows[seen, :64] if i != PAD]
                assert shard.fps[clip] == pytest.approx(4 / [4, 1, 3, 16, 0.5, 2, 7][seen])
                seen += 1
    assert seen == 7 and verify([str(path) for path in paths]).failures == []


def config_of(shards: str, inputs: Path) -> Config:
    return Config.model_validate(
        {
            "model": {
                "num_layers": 1, "hidden_size": 32, "num_heads": 2, "grid": [20, 20], "text_vocab_size": 256,
                "image_vocab_size": 20000, "inherit": "base",
            },
            "tokenizer": {"text": str(inputs / "text"), "frames": str(inputs / "frames")},
            "data": {"train": [{"path": shards}], "workers": 0, "caption_dropout": 0.0},
            "train": {
                "stage": "sequential", "run_dir": "run", "steps": 10, "global_batch_size": 1, "micro_batch_size": 1,
            },
        }
    )  # fmt: skip


def test_training_reads_the_original_s_tokens_exactly(
    file: Path, tmp_path: Path, inputs: Path, text: TextTokenizer, frames: FrameTokenizer
) -> None:
    prepare_records([file], text, frames, RecordSettings(tmp_path / "film"))
    config = config_of(str(tmp_path / "film-*.h5"), inputs)
    summary = check_data(config, frames.fingerprint, text)
    assert summary.train[0].skipped == 0 and summary.train[0].tokenized == 7
    assert str(summary).endswith("; texts: stored token ids")
    dataset = StageDataset(config, open_sources(config.data.train, "data.train"), text, training=True)
    batch = dataset.batch(0, range(7))
    rows = {f"train.bin:{index}": row for index, row in enumerate(np.fromfile(file, "<i4").reshape(-1, 2064))}
    assert len(set(batch.sample_ids)) == 7
    for sample, clip_id in enumerate(batch.sample_ids):
        row = rows[clip_id.split("[")[0]]
        # The trainer of the original drops every <pad>, then pads on the left.
        assert [token + 20000 for token in batch.texts[sample]] == [token for token in row[:64] if token != PAD]
        assert np.array_equal(batch.frames_BTP[sample].ravel(), row[64:])


def test_another_text_tokenizer_reads_the_captions_and_says_so(
    file: Path, tmp_path: Path, inputs: Path, text: TextTokenizer, frames: FrameTokenizer
) -> None:
    prepare_records([file], text, frames, RecordSettings(tmp_path / "film"))
    other = TextTokenizer((inputs / "text" / "text.model").read_bytes(), TextSettings(null_caption="a dog"))
    summary = check_data(config_of(str(tmp_path / "film-*.h5"), inputs), None, other)
    assert summary.train[0].retokenized == 7
    assert "texts: captions; token ids of 7 clips are another text tokenizer's and not used" in str(summary)


def test_inspect_tells_the_token_ids(
    file: Path, tmp_path: Path, text: TextTokenizer, frames: FrameTokenizer
) -> None:
    prepare_records([file], text, frames, RecordSettings(tmp_path / "film"))
    with ShardSet([str(tmp_path / "film-*.h5")]) as shards:
        figures = statistics(shards)
    (made,) = figures["token_ids"]
    assert made["text_tokenizer"] == text.fingerprint
    rows = np.fromfile(file, "<i4").reshape(-1, 2064)
    assert made["per_clip"]["max"] == (rows[:, :64] != PAD).sum(1).max()
    assert f"token ids of text tokenizer {text.fingerprint[:16]}" in describe(figures)


def test_the_last_records_of_every_file_are_held_out(
    file: Path, tmp_path: Path, text: TextTokenizer, frames: FrameTokenizer
) -> None:
    second = write_records(tmp_path / "more.bin", [make_record(text, index) for index in range(4)])
    settings = RecordSettings(tmp_path / "film", eval_fraction=0.25)
    summary = prepare_records([file, second], text, frames, settings)
    ids = {path.name[5:9]: [] for path in summary.shards}
    for path in summary.shards:
        ids[path.name[5:9]] += list(Shard(path).clip_ids)
    assert ids["eval"] == ["train.bin:5", "train.bin:6", "more.bin:3"]
    assert len(ids["trai"]) == 8 and not set(ids["trai"]) & set(ids["eval"])


def test_a_stopped_run_continues_and_gives_the_same_bytes(
    file: Path, tmp_path: Path, text: TextTokenizer, frames: FrameTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare_records([file], text, frames, RecordSettings(tmp_path / "a" / "film", clips_per_shard=3))
    take_apart, calls = records.take_apart, []

    def stop_at_the_fifth(where: str, *rest: object) -> records.Record:
        calls.append(where)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return take_apart(where, *rest)  # type: ignore[arg-type]

    settings = RecordSettings(tmp_path / "b" / "film", clips_per_shard=3)
    monkeypatch.setattr(records, "take_apart", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        prepare_records([file], text, frames, settings)
    assert not list((tmp_path / "b").glob("film-*.h5"))
    parts = prepare_records([file], text, frames, settings)
    assert len(calls) == 5 + 4  # the first shard, of three, was kept
    assert [path.read_bytes() for path in parts.shards] == [path.read_bytes() for path in whole.shards]
    assert prepare_records([file], text, frames, settings).earlier
    with pytest.raises(ConfigError, match="clips_per_shard: 3 before, 4 now"):
        prepare_records([file], text, frames, RecordSettings(settings.out, clips_per_shard=4))


def test_rates_spelled_otherwise_are_read_and_trained_as_they_are_spelled(
    tmp_path: Path, inputs: Path, text: TextTokenizer, frames: FrameTokenizer
) -> None:
    rows = [make_record(text, index, span) for index, span in enumerate(("4.0", "3", "3.0"))]
    # As long as a text can be: "3.0" in place of its "3" would no longer fit into 64 places.
    rows[1][:64] = np.resize(rows[1][: np.flatnonzero(rows[1] == PAD)[0]], 64)
    file = write_records(tmp_path / "whole.bin", rows)
    summary = prepare_records([file], text, frames, RecordSettings(tmp_path / "film"))
    assert Shard(summary.shards[0]).fps.tolist() == pytest.approx([1.0, 4 / 3, 4 / 3])
    config = config_of(str(tmp_path / "film-*.h5"), inputs)
    check_data(config, frames.fingerprint, text)
    dataset = StageDataset(config, open_sources(config.data.train, "data.train"), text, training=True)
    batch = dataset.batch(0, range(3))
    seen = {clip.split("[")[0]: text_BL for clip, text_BL in zip(batch.sample_ids, batch.texts, strict=True)}
    for index, row in enumerate(rows):
        text_BL, valid_BL = text.pad([seen[f"whole.bin:{index}"]], 64)
        assert (text_BL[valid_BL] + 20000).tolist() == [token for token in row[:64] if token != PAD]
    assert text.decode(seen["whole.bin:1"]).startswith("3秒<n>") and len(seen["whole.bin:1"]) == 64


def test_every_whole_span_of_the_original_s_tool_is_read_in_both_spellings(
    tmp_path: Path, inputs: Path, text: TextTokenizer, frames: FrameTokenizer
) -> None:
    spans = [f"{seconds}{tenths}" for seconds in range(1, 17) for tenths in ("", ".0")]
    rows = [make_record(text, index, span) for index, span in enumerate(spans)]
    file = write_records(tmp_path / "whole.bin", rows)
    summary = prepare_records([file], text, frames, RecordSettings(tmp_path / "film"))
    assert Shard(summary.shards[0]).fps.tolist() == pytest.approx([4 / float(span) for span in spans])
    config = config_of(str(tmp_path / "film-*.h5"), inputs)
    dataset = StageDataset(config, open_sources(config.data.train, "data.train"), text, training=True)
    batch = dataset.batch(0, range(len(spans)))
    for sample, clip_id in enumerate(batch.sample_ids):
        row = rows[int(clip_id.split(":")[1].split("[")[0])]
        assert [token + 20000 for token in batch.texts[sample]] == [token for token in row[:64] if token != PAD]


def test_a_dropped_caption_keeps_the_record_s_rate(
    tmp_path: Path, inputs: Path, text: TextTokenizer, frames: FrameTokenizer
) -> None:
    file = write_records(tmp_path / "whole.bin", [make_record(text, 0, "3")])
    prepare_records([file], text, frames, RecordSettings(tmp_path / "film"))
    config = config_of(str(tmp_path / "film-*.h5"), inputs)
    config = config.model_copy(update={"data": config.data.model_copy(update={"caption_dropout": 1.0})})
    dataset = StageDataset(config, open_sources(config.data.train, "data.train"), text, training=True)
    (seen,) = dataset.batch(0, [0]).texts
    rate = text.encode("3秒", None)
    assert seen == [*rate, text.separator_id, *text.encode_null(None)]


def changed(position: int, value: int) -> Callable[[np.ndarray], object]:
    return lambda row: row.__setitem__(position, value)


def without_separator(row: np.ndarray) -> None:
    row[:64][row[:64] == SEPARATOR] = PAD


def without_caption(row: np.ndarray) -> None:
    row[int(np.flatnonzero(row[:64] == SEPARATOR)[0]) + 1 : 64] = PAD


def without_rate(row: np.ndarray) -> None:
    row[: int(np.flatnonzero(row[:64] == SEPARATOR)[0])] = PAD


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (changed(5, 17), r"record 2 holds at position 5 the text id 17, but text ids are 20000\.\."),
        (changed(63, 150_009), "record 2 holds at position 63 the text id 150009"),
        (changed(64 + 401, 20_000), "record 2 holds at position 465 the code 20000 in frame 1, cell 1"),
        (changed(2063, -1), "record 2 holds at position 2063 the code -1 in frame 4, cell 399"),
        (without_separator, "record 2 has no <n>"),
        (without_caption, "record 2 has no caption"),
        (without_rate, "record 2: its text starts with ''"),
    ],
)
def test_impossible_records_are_named_with_the_position(
    file: Path,
    tmp_path: Path,
    text: TextTokenizer,
    frames: FrameTokenizer,
    edit: Callable[[np.ndarray], object],
    said: str,
) -> None:
    rows = list(np.fromfile(file, "<i4").reshape(-1, 2064))
    edit(rows[2])
    write_records(file, rows)
    with pytest.raises(DataError) as caught:
        prepare_records([file], text, frames, RecordSettings(tmp_path / "film"))
    assert str(file) in str(caught.value) and re.search(said, str(caught.value))
    assert not list(tmp_path.glob("film-*.h5"))


def test_files_that_are_no_records_are_refused(
    file: Path, tmp_path: Path, text: TextTokenizer, frames: FrameTokenizer
) -> None:
    def message(*files: Path) -> str:
        with pytest.raises((DataError, ConfigError)) as caught:
            prepare_records(files, text, frames, RecordSettings(tmp_path / "film"))
        return str(caught.value)

    assert "no such file" in message(tmp_path / "nope.bin")
    (tmp_path / "other").mkdir()
    assert "two files are called train.bin" in message(file, tmp_path / "other" / "train.bin")
    file.write_bytes(file.read_bytes()[:-4])
    assert "8252 bytes too many" in message(file) and "records of 8256 bytes" in message(file)
    file.write_bytes(b"")
    assert "has 0 bytes" in message(file)


def test_tokenizers_of_another_kind_are_refused(
    file: Path, tmp_path: Path, inputs: Path, text: TextTokenizer, frames: FrameTokenizer
) -> None:
    small = IcetkVqvae(IcetkVqvaeConfig(width=32, code_dim=4, codebook_size=100))
    with pytest.raises(ConfigError, match="100 codes"):
        prepare_records([file], text, small, RecordSettings(tmp_path / "film"))
    other = TextTokenizer((inputs / "text" / "text.model").read_bytes(), TextSettings(template="{fps} fps"))
    with pytest.raises(ConfigError, match="no {span}"):
        prepare_records([file], other, frames, RecordSettings(tmp_path / "film"))
