from __future__ import annotations

import csv
import json
import shutil
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest

from megacog.errors import ConfigError, EnvError
from megacog.prepare import digits
from megacog.prepare.digits import (
    DIRECTIONS,
    FPS,
    VECTORS,
    Clip,
    captions,
    corpus_clips,
    main,
    render,
    render_clip,
    sample_motion,
    scan_ids,
    scans,
)


def centroids(frames: np.ndarray) -> np.ndarray:
    """Returns the center of the ink of each frame, [T, 2] as (x, y) in pixels."""
    ink = frames[..., 0].astype(np.float64)
    total = ink.sum((1, 2))
    pixels = np.arange(frames.shape[1]) + 0.5
    return np.stack([(ink.sum(1) * pixels).sum(1) / total, (ink.sum(2) * pixels).sum(1) / total], axis=1)


def test_splits_are_disjoint_complete_and_hold_every_digit() -> None:
    parts = [set(scan_ids(split)) for split in ("train", "heldout", "judge")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    for split, at_least in (("train", 80), ("heldout", 15), ("judge", 60)):
        images, labels = scans(split)
        assert images.shape == (len(labels), 8, 8) and images.dtype == np.float32
        assert images.min() == 0.0 and images.max() == 1.0
        assert np.bincount(labels, minlength=10).min() >= at_least


def test_split_is_the_same_everywhere() -> None:
    # Written down once: a judge trained elsewhere must not have seen the held-out handwriting.
    assert scan_ids("heldout")[:8] == (5, 10, 15, 21, 26, 28, 38, 60)
    assert len(scan_ids("train")) == 898


def test_there_are_forty_captions() -> None:
    assert len(set(captions())) == 40
    assert captions()[13] == "the digit 3 moves right"


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("fps", [2.0, 8.0])
def test_ink_moves_at_the_given_speed_and_direction(direction: str, fps: float) -> None:
    images, _ = scans("train")
    start = (16.0 - 5 * VECTORS[direction][0], 16.0 - 5 * VECTORS[direction][1])
    frames = render_clip(images[5], direction, 3.4, start, 5, fps)
    assert frames.shape == (5, 32, 32, 3) and frames.dtype == np.uint8
    steps = np.diff(centroids(frames), axis=0)
    np.testing.assert_allclose(steps, np.tile(np.array(VECTORS[direction]) * 3.4 / fps, (4, 1)), atol=0.05)


def test_start_is_the_center_of_the_scan() -> None:
    frames = render_clip(np.ones((8, 8), dtype=np.float32), "right", 3.0, (12.25, 17.5), 1)
    np.testing.assert_allclose(centroids(frames), [[12.25, 17.5]], atol=0.02)


def test_whole_pixel_shift_moves_the_picture_exactly() -> None:
    images, _ = scans("train")
    frames = render_clip(images[0], "down", 8.0, (16.0, 9.0), 3)
    np.testing.assert_array_equal(frames[0, :-2], frames[2, 2:])


def _clips(split: str, count: int, **options: bool) -> list[Clip]:
    return list(corpus_clips(split, count, 0, **options))  # type: ignore[arg-type]


def test_digits_never_leave_the_frame_and_start_near_the_far_side() -> None:
    half = digits.DIGIT_SIZE / 2
    for clip in _clips("train", 200):
        motion = clip.motion
        vector = np.array(VECTORS[motion.directions[0]])
        end = np.array(motion.start) + vector * motion.speed * (motion.num_frames - 1) / FPS
        for place in (np.array(motion.start), end):
            assert (place >= half - 1e-9).all() and (place <= 32 - half + 1e-9).all()
        # The longest clip fits from every start, whatever the clip's length: the first frame tells no length.
        longest = np.array(motion.start) + vector * motion.speed * digits.LONGEST_SECONDS
        assert (longest >= half - 1e-9).all() and (longest <= 32 - half + 1e-9).all()


def test_speed_is_independent_of_length() -> None:
    clips = _clips("train", 1200)
    assert {clip.motion.num_frames for clip in clips} == {10, 18, 34}
    for num_frames in (10, 18, 34):
        speeds = [clip.motion.speed for clip in clips if clip.motion.num_frames == num_frames]
        assert speeds.count(3.0) / len(speeds) == pytest.approx(0.25, abs=0.12)
        assert set(speeds) == {3.0, 4.0}


def test_captions_take_turns_and_name_what_is_drawn() -> None:
    clips = _clips("train", 80)
    assert [clip.caption for clip in clips] == captions() * 2
    labels = np.concatenate([[clip.digit] for clip in clips])
    _, split_labels = scans("train")
    by_id = dict(zip(scan_ids("train"), split_labels.tolist(), strict=True))
    assert [by_id[clip.scan_id] for clip in clips] == labels.tolist()


def test_clips_depend_on_seed_and_index_only() -> None:
    assert _clips("train", 20) == list(islice(corpus_clips("train", 500, 0), 20))
    assert _clips("train", 20) != list(corpus_clips("train", 20, 1))
    first, second = _clips("heldout", 3)[2], _clips("heldout", 3)[2]
    np.testing.assert_array_equal(render(first), render(second))


def test_the_corpus_command_limits_the_handwriting_of_the_training_clips(tmp_path: Path) -> None:
    options = ["--clips", "80", "--heldout-clips", "1", "--scans-per-digit", "1"]
    assert digits.main([str(tmp_path / "corpus"), *options]) == 0
    records = (tmp_path / "corpus/train/metadata.jsonl").read_text().splitlines()
    assert len({json.loads(record)["scan"] for record in records}) == 10


def test_two_part_clips_turn_halfway() -> None:
    clips = _clips("train", 120, two_part=True)
    assert len({clip.caption for clip in clips}) == 120
    clip = next(clip for clip in clips if clip.motion.directions == ("right", "down"))
    assert clip.caption == f"the digit {clip.digit} moves right then down"
    path = centroids(render(clip))
    middle = (len(path) - 1) // 2
    first, then = path[middle] - path[0], path[-1] - path[-middle - 1]
    assert first[0] > 3.5 and abs(first[1]) < 0.2
    assert then[1] > 3.5 and abs(then[0]) < 0.2


def test_motion_too_long_for_the_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        sample_motion(np.random.default_rng(0), ("right",), num_frames=60)


def test_corpus_folder_holds_what_its_tables_say(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    assert main([str(out), "--clips", "5", "--heldout-clips", "3", "--two-part"]) == 0
    for name, count in (("train", 5), ("heldout", 3), ("two-part/train", 5), ("two-part/heldout", 3)):
        rows = list(csv.DictReader(open(out / name / "captions.csv", encoding="utf-8")))
        records = [json.loads(line) for line in open(out / name / "metadata.jsonl", encoding="utf-8")]
        assert [row["video"] for row in rows] == [record["video"] for record in records]
        assert len(rows) == len(list((out / name).glob("*.mp4"))) == count
    clip = next(corpus_clips("train", 1, 0))
    with av.open(str(out / "train" / "train-000000.mp4")) as container:
        assert container.streams.video[0].average_rate == FPS
        stored = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    error = ((stored.astype(np.float64) - render(clip)) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 42


def test_force_replaces_only_a_corpus_even_an_incomplete_one(tmp_path: Path) -> None:
    mine, corpus = tmp_path / "mine", tmp_path / "digits"
    (mine / "train").mkdir(parents=True)
    (mine / "train" / "captions.csv").write_text("mine")
    few = ["--clips", "1", "--heldout-clips", "1", "--force"]
    with pytest.raises(EnvError, match="mine holds no digits.json .* not replaced"):
        main([str(mine), *few])
    assert (mine / "train" / "captions.csv").read_text() == "mine"
    main([str(corpus), *few])
    shutil.rmtree(corpus / "heldout")
    main([str(corpus), *few])
    assert (corpus / "heldout" / "captions.csv").is_file()
    assert json.loads((corpus / "digits.json").read_text())["clips"] == 1


def test_corpus_is_not_overwritten_without_force(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "digits"), "--clips", "1", "--heldout-clips", "1"]
    main(arguments)
    before = sorted(path.read_bytes() for path in (tmp_path / "digits").rglob("*.*"))
    with pytest.raises(EnvError, match="exists already"):
        main(arguments)
    main([*arguments, "--force"])
    assert sorted(path.read_bytes() for path in (tmp_path / "digits").rglob("*.*")) == before
    with pytest.raises(ConfigError, match="--clips must be at least 1"):
        main([str(tmp_path / "other"), "--clips", "0"])
