from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from deaths import count_operations
from fake_decoders import misbehave, stall_at_five
from tiny_videos import ramp, random_tokenizer, write_captions, write_frames, write_video

from megacog.data.shards import Shard
from megacog.errors import ConfigError, DataError, EnvError
from megacog.prepare import pipeline, state
from megacog.prepare.decode import DecodeSettings, decode_clip
from megacog.prepare.pipeline import PrepareSettings, Summary, encode_in_batches, prepare
from megacog.prepare.sources import Failure, read_source
from megacog.prepare.state import PartialOutput
from megacog.prepare.workers import Decode, WorkerLimits
from megacog.runtime import outcome
from megacog.tokenizers.frames import load_frame_tokenizer

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good clips of every kind and most ways to be bad."""
    root = tmp_path_factory.mktemp("corpus")
    random_tokenizer(root / "tokenizer")
    rows = []
    for k in range(12):
        suffix = (".mp4", ".webm", ".gif", ".mkv")[k % 4]
        rows.append((f"clip{k:02d}{suffix}", f"clip number {k}"))
        write_video(root / rows[-1][0], ramp(6 + k, step=9, start=5 * k), (8, 10)[k % 2])
    write_frames(root / "folder", ramp(5, step=30), [f"{k}.png" for k in range(5)])
    (root / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(100))
    whole = (root / "clip00.mp4").read_bytes()
    (root / "truncated.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    rows[4:4] = [("gone.mp4", "not there"), ("broken.mp4", "broken"), ("empty.mp4", "")]
    rows += [("truncated.mp4", "cut off"), ("folder", "a folder of frames")]
    captions = write_captions(root / "captions.csv", rows)
    with open(captions, "ab") as file:
        file.write(b"clip00.webm,caf\xe9\n")
    return root


def _settings(out: Path, root: Path, **changes: object) -> PrepareSettings:
    decode = DecodeSettings(fps=8.0, height=16, width=16, root=str(root), folder_fps=8.0)
    return PrepareSettings(**{"out": out, "decode": decode, "clips_per_shard": 4, **changes})


def _prepare(corpus: Path, out: Path, decode: Decode = decode_clip, **changes: object) -> Summary:
    source = read_source(corpus / "captions.csv")
    return prepare(
        source, load_frame_tokenizer(corpus / "tokenizer"), _settings(out, corpus, **changes), decode
    )


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".json"}


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """The shards of the corpus, made by one worker."""
    folder = tmp_path_factory.mktemp("made")
    return folder, _prepare(corpus, folder / "clips", workers=1)


def test_good_rows_become_clips_and_bad_ones_are_listed_with_reasons(
    corpus: Path, made: tuple[Path, Summary]
) -> None:
    folder, summary = made
    assert (summary.clips, summary.failed) == (13, 5)
    assert [path.name for path in summary.shards] == [f"clips-{k:05d}-of-00004.h5" for k in range(4)]
    failed = [json.loads(line) for line in (folder / "failed.jsonl").read_text().splitlines()]
    found = {record["line"]: (record["video"], record["reason"]) for record in failed}
    assert list(found) == [6, 7, 8, 17, 19]
    for line, (video, reason) in {
        6: ("gone.mp4", "no such file"),
        7: ("broken.mp4", "truncated or never finished"),
        8: ("empty.mp4", "empty caption"),
        17: ("truncated.mp4", "truncated"),
        19: ("clip00.webm", "not UTF-8"),
    }.items():
        assert found[line][0] == video and reason in found[line][1]
    assert not list(folder.glob("*.partial"))


def test_a_supervisor_learns_of_finished_shards(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(outcome.VARIABLE, str(tmp_path))
    assert outcome.reached(tmp_path) is None
    _prepare(corpus, tmp_path / "clips")
    assert outcome.reached(tmp_path) == "clips-00003.h5"


def test_shards_hold_the_codes_of_the_decoded_frames(corpus: Path, made: tuple[Path, Summary]) -> None:
    folder, summary = made
    tokenizer = load_frame_tokenizer(corpus / "tokenizer")
    shards = [Shard(path) for path in summary.shards]
    assert [shard.num_clips for shard in shards] == [4, 2, 4, 3]
    meta = shards[0].meta
    assert meta.grid == (4, 4) and meta.codebook_size == 240
    assert meta.tokenizer_fingerprint == tokenizer.fingerprint
    assert "PyAV" in meta.decoder and json.loads(meta.settings)["fps"] == 8.0
    everything = {}
    for shard in shards:
        shard.verify()
        for clip, clip_id in enumerate(shard.clip_ids):
            everything[clip_id] = (
                shard.captions[clip],
                float(shard.fps[clip]),
                shard.read(clip, slice(None)),
            )
    caption, fps, codes = everything["clip07.mkv"]
    decoded = decode_clip("clip07.mkv", _settings(folder, corpus).decode)
    assert caption == "clip number 7" and fps == decoded.fps == 8
    # 13 frames at 10 fps are 1.3 s: 11 frames at 8 fps.
    assert codes.shape == (11, 4, 4)
    np.testing.assert_array_equal(codes, tokenizer.encode(torch.from_numpy(decoded.frames)).numpy())
    assert len(np.unique(codes)) > 5
    assert everything["folder"][2].shape == (5, 4, 4)
    assert summary.frames == sum(len(codes) for _, _, codes in everything.values())


def test_workers_and_batches_do_not_change_a_byte(
    corpus: Path, made: tuple[Path, Summary], tmp_path: Path
) -> None:
    _prepare(corpus, tmp_path / "clips", workers=2, batch=7)
    assert _files(tmp_path) == _files(made[0])


def _stall(corpus: Path, out: Path) -> None:
    _prepare(corpus, out, stall_at_five, workers=2)


def test_a_killed_run_continues_to_the_same_bytes(
    corpus: Path, made: tuple[Path, Summary], tmp_path: Path
) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_stall, args=(corpus, tmp_path / "clips"))
    process.start()
    deadline = time.monotonic() + 200
    first = tmp_path / "clips.partial" / "clips-00000.json"
    while not (first.exists() and (corpus / "stalled.pid").exists()) and time.monotonic() < deadline:
        assert process.is_alive()
        time.sleep(0.02)
    assert first.exists(), "the first shard was never finished"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    stalled = int((corpus / "stalled.pid").read_text())
    (corpus / "stalled.pid").unlink()
    deadline = time.monotonic() + 30
    while _alive(stalled) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(stalled), "the decoder outlived its parent"
    assert list(tmp_path.glob("*.h5")) == []
    kept = (tmp_path / "clips.partial" / "clips-00000.h5").stat().st_ino
    assert not (tmp_path / "clips.partial" / "clips-00001.json").exists()
    (tmp_path / "clips.partial" / ".clips-00001.h5.tmp-0123").write_bytes(b"left by a killed writer")

    summary = _prepare(corpus, tmp_path / "clips")
    assert _files(tmp_path) == _files(made[0])
    assert summary.shards[0].stat().st_ino == kept, "a finished shard was made again"
    assert summary.clips == made[1].clips


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_run_killed_while_naming_its_shards_can_finish(
    corpus: Path, made: tuple[Path, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    replace_file = os.replace

    def fail_at_the_second_shard(source: object, target: object) -> None:
        if str(target).endswith(".h5") and ".partial" not in str(target):
            calls.append(target)
            if len(calls) == 2:
                raise RuntimeError("killed")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_second_shard)
    with pytest.raises(RuntimeError, match="killed"):
        _prepare(corpus, tmp_path / "clips")
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.h5"))) == 1
    _prepare(corpus, tmp_path / "clips", decode=misbehave)  # which decodes nothing of this
    assert _files(tmp_path) == _files(made[0])


@pytest.mark.parametrize("left", [["settings.json", "lock"], ["clips-00001.json"], []])
def test_a_run_killed_while_tidying_up_is_finished(corpus: Path, tmp_path: Path, left: list[str]) -> None:
    first = _prepare(corpus, tmp_path / "clips")
    files = _files(tmp_path)
    (tmp_path / "clips.partial").mkdir()
    for name in left:
        (tmp_path / "clips.partial" / name).write_text("{}")
    again = _prepare(corpus, tmp_path / "clips", decode=misbehave)
    assert again.earlier and again.clips == first.clips
    assert _files(tmp_path) == files and not (tmp_path / "clips.partial").exists()


def test_doing_it_twice_does_nothing_and_other_settings_are_refused(corpus: Path, tmp_path: Path) -> None:
    first = _prepare(corpus, tmp_path / "clips")
    again = _prepare(corpus, tmp_path / "clips", decode=misbehave, workers=2)
    assert again.earlier and replace(again, seconds=0, earlier=False) == replace(first, seconds=0)
    with pytest.raises(ConfigError, match="clips_per_shard: 4 before, 5 now.*--overwrite"):
        _prepare(corpus, tmp_path / "clips", clips_per_shard=5)
    bigger = _prepare(corpus, tmp_path / "clips", clips_per_shard=20, overwrite=True)
    assert [path.name for path in sorted(tmp_path.glob("*.h5"))] == ["clips-00000-of-00001.h5"]
    assert bigger.clips == first.clips
    bigger.shards[0].unlink()
    with pytest.raises(DataError, match="missing or not as clips.json says"):
        _prepare(corpus, tmp_path / "clips", clips_per_shard=20)


def test_changed_settings_do_not_continue_a_stopped_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "encode_in_batches", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _prepare(corpus, tmp_path / "clips")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="eval_fraction: 0.0 before, 0.5 now"):
        _prepare(corpus, tmp_path / "clips", eval_fraction=0.5)
    assert _prepare(corpus, tmp_path / "clips").clips == 13


def test_foreign_shards_are_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "clips-00000-of-00009.h5"
    foreign.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="exists already.*--overwrite"):
        _prepare(corpus, tmp_path / "clips")
    assert [path.name for path in tmp_path.iterdir()] == [foreign.name]
    _prepare(corpus, tmp_path / "other")
    assert foreign.read_bytes() == b"precious"


def test_overwriting_spares_the_shards_of_another_preparation(corpus: Path, tmp_path: Path) -> None:
    kept = _prepare(corpus, tmp_path / "clips-train")
    with pytest.raises(ConfigError, match="belong to another preparation"):
        _prepare(corpus, tmp_path / "clips", eval_fraction=0.3, overwrite=True)
    assert all(path.is_file() for path in kept.shards)


def test_train_and_evaluation_shards_share_no_video(corpus: Path, tmp_path: Path) -> None:
    summary = _prepare(corpus, tmp_path / "clips", eval_fraction=0.4)
    parts = {
        name: [p for p in summary.shards if p.name.startswith(f"clips-{name}-")] for name in ("train", "eval")
    }
    ids = {name: {clip for path in paths for clip in Shard(path).clip_ids} for name, paths in parts.items()}
    assert len(ids["train"]) >= 1 and len(ids["eval"]) >= 1
    assert not ids["train"] & ids["eval"] and len(ids["train"] | ids["eval"]) == 13


def test_a_slice_of_failures_leaves_no_gap_in_the_numbers(corpus: Path, tmp_path: Path) -> None:
    summary = _prepare(corpus, tmp_path / "clips", clips_per_shard=2)
    assert [path.name for path in summary.shards] == [f"clips-{k:05d}-of-00007.h5" for k in range(7)]


def test_preparations_in_one_folder_keep_their_failures_apart(tmp_path: Path) -> None:
    failures = [Failure(7, "b.mp4", "gone"), Failure(3, "a.mp4", "broken")]
    for stem in ("one", "two", "one"):
        assert PartialOutput(tmp_path / stem).write_failures(failures) == tmp_path / "failed.jsonl"
    lines = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert [(line["stem"], line["line"]) for line in lines] == [
        ("two", 3),
        ("two", 7),
        ("one", 3),
        ("one", 7),
    ]
    assert PartialOutput(tmp_path / "two").write_failures([]) is None
    assert PartialOutput(tmp_path / "one").write_failures([]) is None
    assert not (tmp_path / "failed.jsonl").exists()


def test_a_death_at_any_moment_leaves_nothing_but_finished_files_and_the_folder_beside_them(tmp_path: Path) -> None:
    output, seen = PartialOutput(tmp_path / "clips"), set()

    def finish() -> None:
        with output.locked():
            output.begin({}, [])
            output.finish([], {}, [Failure(3, "a.mp4", "broken")])

    assert count_operations(finish, lambda number: seen.update(path.name for path in tmp_path.iterdir())) > 10
    assert seen == {"clips.partial", "clips.json", "failed.jsonl"}


def test_nothing_usable_is_an_error_and_can_be_tried_again(corpus: Path, tmp_path: Path) -> None:
    captions = write_captions(tmp_path / "c.csv", [("late.mp4", "comes later"), ("b.mp4", "")])
    tokenizer = load_frame_tokenizer(corpus / "tokenizer")
    settings = _settings(tmp_path / "out" / "clips", tmp_path)
    with pytest.raises(DataError, match=r"not one of 2 rows .*line 2: no such file"):
        prepare(read_source(captions), tokenizer, settings)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["failed.jsonl"]
    shutil.copy(corpus / "clip00.mp4", tmp_path / "late.mp4")
    assert prepare(read_source(captions), tokenizer, settings).clips == 1


def test_a_frame_size_that_does_not_fit_the_tokenizer_is_named(corpus: Path, tmp_path: Path) -> None:
    decode = replace(_settings(tmp_path, corpus).decode, height=18)
    with pytest.raises(DataError, match="18x16"):
        tokenizer = load_frame_tokenizer(corpus / "tokenizer")
        prepare(
            read_source(corpus / "captions.csv"),
            tokenizer,
            replace(_settings(tmp_path / "c", corpus), decode=decode),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_with_figures_and_keeps_what_is_done(
    corpus: Path, made: tuple[Path, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(EnvError, match=r"16777216 bytes .* needed, 1048576 bytes .* free"):
        _prepare(corpus, tmp_path / "clips")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(state, "_MINIMUM_SPACE_BYTES", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(EnvError, match="100 bytes .* free"):
        _prepare(corpus, tmp_path / "clips")
    monkeypatch.undo()
    assert (tmp_path / "clips.partial" / "clips-00000.h5").is_file()
    _prepare(corpus, tmp_path / "clips")
    assert _files(tmp_path) == _files(made[0])


def test_two_runs_cannot_write_one_output(corpus: Path, tmp_path: Path) -> None:
    with PartialOutput(tmp_path / "clips").locked():
        with pytest.raises(EnvError, match="another process is preparing"):
            _prepare(corpus, tmp_path / "clips")
    assert list(tmp_path.iterdir()) == []


def test_a_hanging_decoder_costs_its_clip_only(corpus: Path, tmp_path: Path) -> None:
    summary = _prepare(corpus, tmp_path / "clips", stall_at_five, limits=WorkerLimits(timeout=4.0), workers=2)
    (corpus / "stalled.pid").unlink()
    assert (summary.clips, summary.failed) == (12, 6)
    assert "clip05.webm" in (tmp_path / "failed.jsonl").read_text()
    assert "longer than 4 s" in (tmp_path / "failed.jsonl").read_text()


@pytest.mark.parametrize("batch", [1, 5, 16, 1000])
def test_batches_across_clips_give_each_clip_its_own_codes(corpus: Path, batch: int) -> None:
    tokenizer = load_frame_tokenizer(corpus / "tokenizer")
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 256, (n, 16, 16, 3), np.uint8) for n in (1, 7, 2, 30, 1)]
    coded = list(encode_in_batches(iter(clips), tokenizer, batch))
    assert [len(codes) for codes in coded] == [1, 7, 2, 30, 1]
    for frames, codes in zip(clips, coded, strict=True):
        alone = [tokenizer.encode(torch.from_numpy(frames[k : k + 1])) for k in range(len(frames))]
        np.testing.assert_array_equal(codes, torch.cat(alone).numpy())
    assert list(encode_in_batches(iter([]), tokenizer, batch)) == []
