"""What a stage gets to see of a clip: codes, text, corruption."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megacog.config.schema import Config
from megacog.data.dataset import StageDataset, Texts, open_sources
from megacog.data.loader import evaluation_batches, training_batches
from megacog.data.shards import Shard
from megacog.errors import DataError
from megacog.tokenizers.text import TextTokenizer

Write = Callable[..., Path]
Make = Callable[..., Config]
CLIPS = [(f"clip-{index}", 9 + 8 * index, 8.0) for index in range(5)]


def stage_dataset(config: Config, text: TextTokenizer, training: bool = True) -> StageDataset:
    entries, name = (config.data.train, "data.train") if training else (config.data.eval, "data.eval")
    return StageDataset(config, open_sources(entries, name), text, training=training)


def parse(sample_id: str) -> tuple[str, slice]:
    clip_id, window = sample_id[:-1].split("[")
    return clip_id, slice(*map(int, window.split(":")))


def test_a_sample_is_the_window_its_id_names_with_its_caption_and_real_span(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    path = write_clips("a.h5", CLIPS)
    config = make_config([path], data={"caption_dropout": 0.0})
    shard = Shard(path)
    batch = stage_dataset(config, text).batch(0, range(20))
    for row, sample_id in enumerate(batch.sample_ids):
        clip_id, window = parse(sample_id)
        clip = list(shard.clip_ids).index(clip_id)
        np.testing.assert_array_equal(batch.frames_BTP[row], shard.read(clip, window).reshape(5, 4))
        assert batch.fps[row] == 8 / window.step
        assert batch.texts[row] == text.encode(shard.captions[clip], 4 * window.step / 8)
    assert batch.context_BTP is None
    assert len(set(batch.sample_ids)) > 5


@pytest.mark.parametrize(("model", "what"), [({"image_vocab_size": 9}, "code 15"), ({"text_vocab_size": 5}, "token")])
def test_ids_that_the_model_has_not_are_an_error_with_shard_and_clip(
    write_clips: Write, make_config: Make, text: TextTokenizer, model: dict[str, int], what: str
) -> None:
    path = write_clips("a.h5", CLIPS)
    with pytest.raises(DataError, match=rf"{path}: clip \S+: .*{what} \d* ?is outside 0\.\."):
        stage_dataset(make_config([path], model=model), text).batch(0, range(20))


def test_each_epoch_shows_every_clip_once_at_new_places(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    config = make_config([write_clips("a.h5", [(f"clip-{n}", 100, 8.0) for n in range(6)])])
    dataset = stage_dataset(config, text)
    epochs = [dataset.batch(0, range(6 * epoch, 6 * epoch + 6)).sample_ids for epoch in range(3)]
    for sample_ids in epochs:
        assert {parse(sample_id)[0] for sample_id in sample_ids} == {f"clip-{n}" for n in range(6)}
    assert len({sample_id for sample_ids in epochs for sample_id in sample_ids}) > 12


def test_dropout_drops_the_caption_never_the_rate(write_clips: Write, make_config: Make, text: TextTokenizer) -> None:
    config = make_config([write_clips("a.h5", CLIPS)], data={"caption_dropout": 0.3})
    batch = stage_dataset(config, text).batch(0, range(1000))
    dropped = sum(ids == text.encode_null(4 / fps) for ids, fps in zip(batch.texts, batch.fps, strict=True))
    # 4 standard deviations of a binomial share
    assert dropped / 1000 == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 1000) ** 0.5)


def test_base_takes_single_frames_of_clips_and_images_without_a_rate(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    path = write_clips("a.h5", [("clip", 4, 8.0), ("image", 1, 1.0)])
    config = make_config([path], train={"stage": "base"}, data={"caption_dropout": 0.5})
    batch = stage_dataset(config, text).batch(0, range(60))
    assert batch.frames_BTP.shape == (60, 1, 4)
    assert {parse(sample_id)[0] for sample_id in batch.sample_ids} == {"clip", "image"}
    assert set(batch.fps) == {0.0}
    captions = [text.encode(f"the digit {digit} moves left", None) for digit in range(2)]
    assert all(ids in [*captions, text.encode_null(None)] for ids in batch.texts)
    first = make_config([path], train={"stage": "base"}, data={"base_frame": "first"})
    assert set(stage_dataset(first, text).batch(0, range(60)).sample_ids) == {"clip[0:1:1]", "image[0:1:1]"}


def test_base_takes_its_video_share_from_windows_with_their_rate_text(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    path = write_clips("a.h5", [("clip", 40, 8.0), ("image", 1, 1.0)])
    data = {"caption_dropout": 0.0, "base_frame": "first", "base_video_share": 0.4}
    batch = stage_dataset(make_config([path], train={"stage": "base"}, data=data), text).batch(0, range(600))
    caption = text.encode("the digit 0 moves left", None)
    from_windows = [ids == text.encode("the digit 0 moves left", 4.0) for ids in batch.texts]
    plain = [ids in (caption, text.encode("the digit 1 moves left", None)) for ids in batch.texts]
    assert all(one != other for one, other in zip(from_windows, plain, strict=True))
    of_clip = [parse(sample_id) for sample_id in batch.sample_ids if parse(sample_id)[0] == "clip"]
    share = sum(from_windows) / len(of_clip)
    assert share == pytest.approx(0.4, abs=4 * (0.24 / len(of_clip)) ** 0.5)
    windows = [parse(i)[1] for i, of_window in zip(batch.sample_ids, from_windows, strict=True) if of_window]
    frames = {window.start for window in windows}
    assert len(frames) > 25 and max(frames) == 39
    assert batch.frames_BTP.shape == (600, 1, 4)


def test_images_and_short_clips_do_not_reach_the_video_stages(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    path = write_clips("a.h5", [("clip", 9, 8.0), ("image", 1, 1.0), ("short", 4, 8.0)])
    for stage in ("sequential", "interpolation"):
        batch = stage_dataset(make_config([path], train={"stage": stage}), text).batch(0, range(20))
        assert {parse(sample_id)[0] for sample_id in batch.sample_ids} == {"clip"}


def test_a_source_without_a_usable_clip_is_an_error_that_names_it(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    good, short = write_clips("good.h5", CLIPS), write_clips("short.h5", [("short", 4, 8.0)])
    with pytest.raises(DataError, match=r"data.train\[1\] .*short.h5.*longest has 4 frames.*needed are 5"):
        stage_dataset(make_config([good, short]), text)
    with pytest.raises(DataError, match="data.train names no shards"):
        stage_dataset(make_config([]), text)


def test_a_phase_changes_the_rates_at_its_step(write_clips: Write, make_config: Make, text: TextTokenizer) -> None:
    rates = {"phases": [{"from_step": 3, "min_fps": 4.0}]}
    config = make_config([write_clips("a.h5", [("clip", 40, 8.0)])], data={"rates": rates})
    with training_batches(config, text, data_rank=0, data_size=1, start_step=2) as batches:
        fps = [set(next(batches).fps_B.tolist()) for _ in range(2 * batches.accumulation)]
    assert fps == [{1.0}] * 4 + [{4.0}] * 4


@pytest.mark.parametrize(("stage", "given"), [("sequential", [0]), ("interpolation", [0, 2, 4])])
def test_corruption_resamples_its_share_of_the_given_frames_only(
    write_clips: Write, make_config: Make, text: TextTokenizer, stage: str, given: list[int]
) -> None:
    path = write_clips("a.h5", CLIPS)
    config = make_config([path], [path], train={"stage": stage, "context_corruption": 0.4})
    clean = make_config([path], train={"stage": stage})
    dataset = stage_dataset(config, text)
    batch = dataset.batch(0, range(600))
    assert batch.context_BTP is not None
    np.testing.assert_array_equal(batch.frames_BTP, stage_dataset(clean, text).batch(0, range(600)).frames_BTP)
    changed = batch.context_BTP != batch.frames_BTP
    predicted = [frame for frame in range(5) if frame not in given]
    assert not changed[:, predicted].any()
    # One in 16 draws hits the old code; 5 standard deviations.
    cells = 600 * 4 * len(given)
    assert changed[:, given].mean() == pytest.approx(0.4 * 15 / 16, abs=5 * (0.25 / cells) ** 0.5)
    assert batch.context_BTP.max() == 15 and batch.context_BTP.min() == 0
    again = stage_dataset(config, text).batch(0, range(600)).context_BTP
    np.testing.assert_array_equal(batch.context_BTP, again)
    held_out = evaluation_batches(config, text, data_rank=0, data_size=1, count=2)
    assert all(batch.context_BTP is None for batch in held_out)


def test_sources_are_mixed_by_weight(write_clips: Write, make_config: Make, text: TextTokenizer) -> None:
    a, b = write_clips("a.h5", [("a", 9, 8.0)]), write_clips("b.h5", [(f"b-{n}", 9, 8.0) for n in range(9)])
    config = make_config([{"path": str(a), "weight": 3.0}, {"path": str(b), "weight": 1.0}])
    ids = [parse(sample_id)[0] for sample_id in stage_dataset(config, text).batch(0, range(36)).sample_ids]
    assert ids.count("a") == 27
    assert sorted(sample_id for sample_id in ids if sample_id != "a") == [f"b-{n}" for n in range(9)]


def test_clips_are_found_across_shards(write_clips: Write, make_config: Make, text: TextTokenizer) -> None:
    for index, count in enumerate((2, 0, 3)):
        clips = [(f"{index}-{clip}", 9, 8.0) for clip in range(count)]
        path = write_clips(f"set-{index:05d}-of-00003.h5", clips)
    config = make_config([path.parent / "set-*.h5"])
    ids = {parse(sample_id)[0] for sample_id in stage_dataset(config, text).batch(0, range(5)).sample_ids}
    assert ids == {"0-0", "0-1", "2-0", "2-1", "2-2"}


def test_stored_tokens_replace_the_caption_when_their_tokenizer_matches(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    tokens = text.encode("the digit 7 moves right", None)
    own = write_clips("own.h5", [("a", 9, 8.0)], token_ids=tokens, text_tokenizer=text.fingerprint)
    foreign = write_clips("foreign.h5", [("a", 9, 8.0)], token_ids=[1, 2], text_tokenizer="other")
    for path, caption in ((own, "the digit 7 moves right"), (foreign, "the digit 0 moves left")):
        config = make_config([path], data={"caption_dropout": 0.0})
        assert stage_dataset(config, text).batch(0, [0]).texts == [text.encode(caption, 1.0)]


def test_stored_rate_text_goes_with_windows_of_the_whole_clip_only(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    stored = [*text.encode("the digit", None), *text.encode("7", 1.0)]  # another rate text than the tokenizer's
    path = write_clips("own.h5", [("a", 5, 4.0)], token_ids=stored, text_tokenizer=text.fingerprint)
    parts = Texts(text, 5)
    with Shard(path) as shard:
        assert parts.of(shard, 0, 1.0) == stored
        assert parts.of(shard, 0, 0.5) == text.encode("7", 0.5)
        assert parts.of(shard, 0, None) == text.encode("7", None)
        rate = stored[: -len(text.encode("7", None))]
        assert parts.of(shard, 0, 1.0, dropped=True) == [*rate, *text.encode_null(None)]


def test_evaluation_never_depends_on_the_training_seed_and_drops_no_caption(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    path = write_clips("a.h5", CLIPS)

    def samples(seed: int) -> list[tuple[list[str], list[int]]]:
        config = make_config([path], [path], train={"seed": seed}, data={"caption_dropout": 1.0})
        batches = evaluation_batches(config, text, data_rank=0, data_size=1, count=4)
        assert [len(batch) for batch in batches] == [2] * 4
        return [(batch.sample_ids, batch.text_BL.tolist()) for batch in batches]

    assert samples(1) == samples(2)
    null = [row[-len(text.encode_null(1.0)) :] for _, rows in samples(1) for row in rows]
    assert all(row != text.encode_null(1.0) for row in null)


@pytest.mark.parametrize("data_size", [1, 2, 3, 4, 7])
def test_all_ranks_together_evaluate_the_same_samples_in_equally_many_batches(
    write_clips: Write, make_config: Make, text: TextTokenizer, data_size: int
) -> None:
    path = write_clips("a.h5", CLIPS)
    config = make_config([path], [path])

    def of_rank(rank: int, size: int) -> list[list[str]]:
        batches = evaluation_batches(config, text, data_rank=rank, data_size=size, count=6)
        return [batch.sample_ids for batch in batches]

    ranks = [of_rank(rank, data_size) for rank in range(data_size)]
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    union = sorted(sample_id for batches in ranks for batch in batches for sample_id in batch)
    whole = sorted(sample_id for batch in of_rank(0, 1) for sample_id in batch)
    assert set(union) == set(whole)
    if 12 % data_size == 0:
        assert union == whole


def test_without_evaluation_data_there_is_nothing_to_evaluate(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    config = make_config([write_clips("a.h5", CLIPS)])
    assert evaluation_batches(config, text, data_rank=0, data_size=1, count=4) == []


def test_no_more_files_are_open_than_allowed(
    write_clips: Write, make_config: Make, text: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(6):
        path = write_clips(f"set-{index:05d}-of-00006.h5", [(f"{index}", 9, 8.0)])
    dataset = stage_dataset(make_config([path.parent / "set-*.h5"]), text)
    whole = dataset.batch(0, range(40))

    def open_shards() -> int:
        links = (os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd))
        return sum(link.startswith(str(path.parent)) for link in links)

    assert open_shards() == 6
    monkeypatch.setattr("megacog.data.dataset.OPEN_SHARDS", 2)
    limited = stage_dataset(make_config([path.parent / "set-*.h5"]), text)
    before = open_shards()
    batch = limited.batch(0, range(40))
    assert open_shards() - before == 2
    np.testing.assert_array_equal(batch.frames_BTP, whole.frames_BTP)


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")
