"""Data that does not fit the model or itself is refused before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megacog.config.schema import Config
from megacog.data.check import check_data, rate_table
from megacog.data.dataset import StageDataset, open_sources
from megacog.errors import ConfigError, DataError
from megacog.tokenizers.text import TextTokenizer, train_text_tokenizer

Write = Callable[..., Path]
Make = Callable[..., Config]
CLIPS = [("a", 9, 8.0), ("b", 40, 8.0)]


def test_good_data_is_summed_up(write_clips: Write, make_config: Make) -> None:
    train = write_clips("a.h5", [*CLIPS, ("image", 1, 1.0), ("short", 4, 8.0)])
    config = make_config([train], [write_clips("b.h5", [("c", 80, 8.0)])])
    summary = check_data(config, "f" * 64)
    assert (summary.train[0].clips, summary.train[0].skipped, summary.train[0].frames) == (4, 2, 54)
    assert summary.train[0].hours == pytest.approx((53 / 8 + 1) / 3600)
    assert (summary.eval[0].clips, summary.eval[0].skipped) == (1, 0)
    lines = str(summary).splitlines()
    assert lines[0].startswith("data.train[0]") and "2 too short for every rate: not used" in lines[0]
    assert lines[1].startswith("data.eval[0]") and "too short" not in lines[1]
    assert all(line.endswith("; texts: captions") for line in lines)


def test_a_source_of_both_kinds_says_how_many_texts_are_stored_token_ids(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    write_clips("set-00000-of-00002.h5", [("a", 9, 8.0)])
    write_clips(
        "set-00001-of-00002.h5", [("b", 9, 8.0), ("c", 9, 8.0)], token_ids=[3], text_tokenizer=text.fingerprint
    )
    folder = write_clips("other.h5", CLIPS).parent
    summary = check_data(make_config([folder / "set-*.h5"]))
    assert "texts: stored token ids of 2 clips, captions of 1" in str(summary)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fingerprint": "0" * 64}, r"b.h5 was made by another frame tokenizer \(000000000000"),
        ({"grid": (2, 3)}, r"b.h5 holds frames of 2 x 3 codes, model.grid is \[2, 2\]"),
        ({"codebook_size": 32}, "b.h5 has codebook_size 32, model.image_vocab_size is 16"),
        ({"temporal_factor": 4}, "b.h5 has temporal_factor 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("fingerprint", [None, "f" * 64])
def test_shards_that_do_not_fit_are_named(
    write_clips: Write, make_config: Make, options: dict, message: str, fingerprint: str | None
) -> None:
    config = make_config([write_clips("a.h5", CLIPS), write_clips("b.h5", [("c", 9, 8.0)], **options)])
    with pytest.raises(DataError, match=message):
        check_data(config, fingerprint)


def test_shards_of_another_tokenizer_are_refused_though_they_agree(write_clips: Write, make_config: Make) -> None:
    config = make_config([write_clips("a.h5", CLIPS)])
    check_data(config, None)
    with pytest.raises(DataError, match="a.h5 was made by another frame tokenizer"):
        check_data(config, "0" * 64)


def test_a_clip_in_training_and_evaluation_is_an_error(write_clips: Write, make_config: Make) -> None:
    train = write_clips("a.h5", [(f"clip-{index}", 9, 8.0) for index in range(9)])
    held_out = write_clips("b.h5", [("new", 9, 8.0), *((f"clip-{index}", 9, 8.0) for index in range(1, 8))])
    with pytest.raises(DataError, match=r"7 clip\(s\) of .*a.h5.*: clip-1, clip-2, clip-3, clip-4, clip-5, \.\.\."):
        check_data(make_config([train], [held_out]))


def test_an_empty_source_is_an_error(write_clips: Write, make_config: Make) -> None:
    with pytest.raises(DataError, match=r"data.train\[1\] .*b.h5\) holds no clips"):
        check_data(make_config([write_clips("a.h5", CLIPS), write_clips("b.h5", [])]))
    with pytest.raises(DataError, match="data.train names no shards"):
        check_data(make_config([]))
    with pytest.raises(DataError, match="no shard matches"):
        check_data(make_config([Path("nowhere-*.h5")]))


def test_a_caption_that_is_too_long_is_named_with_its_shard(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    caption = "the digit 3 moves left " * 9
    path = write_clips("a.h5", [*CLIPS, ("long", 9, 8.0)], captions={"long": caption})
    with pytest.raises(DataError, match="a.h5: clip 'long' has a text of .*model.text_length 24: 'the digit 3"):
        check_data(make_config([path]))
    # A clip that is not used may have any caption.
    check_data(make_config([write_clips("b.h5", [*CLIPS, ("long", 4, 8.0)], captions={"long": caption})]))


def test_the_rate_text_counts_in_the_length(write_clips: Write, make_config: Make, text: TextTokenizer) -> None:
    path = write_clips("a.h5", [("a", 9, 8.0)])
    caption = len(text.encode("the digit 0 moves left", None))
    whole = max(len(text.encode("the digit 0 moves left", span)) for span in (0.5, 1.0))
    assert caption < whole
    data = {"caption_dropout": 0.0}
    check_data(make_config([path], model={"text_length": whole}, data=data))
    with pytest.raises(DataError, match=f"model.text_length {whole - 1}"):
        check_data(make_config([path], model={"text_length": whole - 1}, data=data))
    check_data(make_config([path], model={"text_length": caption}, data=data, train={"stage": "base"}))


@pytest.mark.parametrize("stage", ["sequential", "base"])
def test_a_caption_is_tokenized_once_and_meets_the_longest_rate_text_of_its_own_rates(
    write_clips: Write, make_config: Make, text: TextTokenizer, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    captions = {"short": "the digit 1 moves right", "long": "the digit 2 moves right"}
    path = write_clips("a.h5", [("short", 40, 8.0), ("long", 129, 8.0)], captions=captions)
    fits = {span: len(text.encode(captions["long"], span)) for span in (16.0, 4.0)}
    assert fits[16.0] == fits[4.0] + 1
    options = {"data": {"caption_dropout": 0.0, "base_video_share": 0.5}, "train": {"stage": stage}}
    seen: list[str] = []
    encode = TextTokenizer._encode_caption
    monkeypatch.setattr(TextTokenizer, "_encode_caption", lambda self, text: (seen.append(text), encode(self, text))[1])
    check_data(make_config([path], model={"text_length": fits[16.0]}, **options))
    assert [seen.count(caption) for caption in captions.values()] == [1, 1]
    with pytest.raises(DataError, match=f"clip 'long' has a text of {fits[16.0]} tokens"):
        check_data(make_config([path], model={"text_length": fits[4.0]}, **options))


# The text tokenizer of these tests names frames per second: "1", or "7.5", which takes more tokens.
LONG_RATES = {
    "a series rate": {"data": {"rates": {"series": [1.0, 7.5], "interpolation": [2.0]}}},
    "an interpolation rate": {"data": {"rates": {"series": [1.0], "interpolation": [7.5]}}},
    "a stored rate": {"fps": 7.5},
    "generation.seconds": {"generation": {"seconds": 3.2, "levels": 0}},
    "an interpolated span": {"generation": {"seconds": 16.0, "levels": 2}, "data": {"caption_dropout": 0.0}},
}


@pytest.mark.parametrize("case", LONG_RATES)
def test_the_null_text_must_fit_at_every_rate(
    write_clips: Write, make_config: Make, tmp_path: Path, case: str
) -> None:
    train_text_tokenizer(["the digit 3 moves up"], tmp_path / "fps", 80, template="{fps}")
    text = TextTokenizer.load(tmp_path / "fps")
    room = len(text.encode_null(4.0))
    assert len(text.encode_null(4 / 7.5)) > room
    path = write_clips("a.h5", [("a", 40, LONG_RATES[case].get("fps", 8.0))], captions={"a": "up"})
    fine = {
        "tokenizer": {"text": str(tmp_path / "fps")},
        "data": {"rates": {"series": [1.0], "interpolation": [2.0]}},
        "generation": {"seconds": 4.0, "levels": 2, "guidance": 2.0},
        "model": {"text_length": room},
    }
    check_data(make_config([write_clips("b.h5", [("b", 40, 8.0)], captions={"b": "up"})], **fine))
    changed = {name: {**fine.get(name, {}), **section} for name, section in LONG_RATES[case].items() if name != "fps"}
    with pytest.raises(DataError, match=rf"the null text at [\d.]+ seconds .* model.text_length is {room}. Raise"):
        check_data(make_config([path], **{**fine, **changed}))


def test_a_sample_prompt_that_is_too_long_is_an_error(write_clips: Write, make_config: Make) -> None:
    path, samples = write_clips("a.h5", CLIPS), {"every": 5, "prompts": ["the digit 3 moves left " * 9]}
    with pytest.raises(DataError, match="text 'the digit 3 moves left .*model.text_length"):
        check_data(make_config([path], samples=samples))
    check_data(make_config([path], samples={**samples, "every": 0}))


def test_stored_tokens_outside_the_vocabulary_are_refused(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    path = write_clips("a.h5", CLIPS, token_ids=[1, 5000], text_tokenizer=text.fingerprint)
    with pytest.raises(DataError, match="a.h5: clip 'a' has token id 5000"):
        check_data(make_config([path]))


def test_the_rate_table_counts_clips_and_expected_shares(write_clips: Write, make_config: Make) -> None:
    path = write_clips("a.h5", [("a", 9, 8.0), ("b", 33, 8.0), ("odd", 10, 5.0), ("short", 3, 8.0)])
    rates = {"policy": "mixture", "phases": [{"from_step": 7, "min_fps": 4.0}]}
    rows = rate_table(make_config([path], data={"rates": rates}))
    table = [(row.from_step, row.fps, row.span_seconds, row.clips) for row in rows]
    assert table == [
        (0, 1.0, 4.0, 1),
        (0, 2.0, 2.0, 1),
        (0, 4.0, 1.0, 2),
        (0, 5.0, 0.8, 1),
        (0, 8.0, 0.5, 2),
        (0, None, None, 1),
        (7, 4.0, 1.0, 2),
        (7, 5.0, 0.8, 1),
        (7, 8.0, 0.5, 2),
        (7, None, None, 1),
    ]
    assert [row.share for row in rows[:5]] == pytest.approx(
        [0.625 / 3, 0.125 / 3, (0.75 + 0.125) / 3, 1 / 3, (0.25 + 0.125) / 3]
    )
    assert sum(row.share for row in rows[6:]) == pytest.approx(1)


def test_the_rate_table_tells_spans_of_real_and_not_of_rounded_rates(write_clips: Write, make_config: Make) -> None:
    (row,) = rate_table(make_config([write_clips("a.h5", [("a", 5, 4 / 3)])]))
    assert row.fps == 1.33 and row.span_seconds == pytest.approx(3.0, abs=1e-6)


def test_training_follows_the_rate_table(write_clips: Write, make_config: Make, text: TextTokenizer) -> None:
    paths = [write_clips("a.h5", [("a", 9, 8.0), ("b", 40, 8.0)]), write_clips("b.h5", [("c", 70, 8.0)])]
    sources = [{"path": str(paths[0]), "weight": 1.0}, {"path": str(paths[1]), "weight": 2.0}]
    config = make_config(sources, data={"rates": {"policy": "mixture"}})
    dataset = StageDataset(config, open_sources(config.data.train, "data.train"), text, training=True)
    fps = dataset.batch(0, range(3000)).fps
    for row in rate_table(config):
        # 4 standard deviations
        assert fps.count(row.fps) / 3000 == pytest.approx(row.share, abs=4 * (0.25 / 3000) ** 0.5)


def test_the_base_stage_has_one_row_without_a_rate(write_clips: Write, make_config: Make) -> None:
    config = make_config([write_clips("a.h5", CLIPS)])
    (row,) = rate_table(config, stage="base")
    assert (row.fps, row.clips, row.share) == (None, 2, pytest.approx(1))


def test_a_text_embedding_with_fewer_rows_than_pieces_is_refused(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    config = make_config([write_clips("a.h5", CLIPS)], model={"text_vocab_size": text.vocab_size - 1})
    with pytest.raises(ConfigError, match=f"Raise model.text_vocab_size to {text.vocab_size}"):
        check_data(config)
