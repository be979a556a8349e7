from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_videos import ramp, real_video, write_frames, write_video

from megacog.prepare.containers import ClipError
from megacog.prepare.decode import DecodeSettings, center_box, decode_clip, nearest_frames, sample_times


def _settings(root: Path, fps: float = 8.0, **changes: object) -> DecodeSettings:
    return DecodeSettings(**{"fps": fps, "height": 16, "width": 16, "root": str(root), **changes})


def _levels(frames: np.ndarray) -> list[float]:
    return frames.mean(axis=(1, 2, 3)).tolist()


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm", ".mkv"])
@pytest.mark.parametrize(("source", "wanted"), [(16, 8.0), (24, 8.0), (8, 8.0), (30, 8.0), (20, 3.0)])
def test_stored_frames_are_those_nearest_to_the_wanted_times(
    tmp_path: Path, suffix: str, source: int, wanted: float
) -> None:
    count = 30
    write_video(tmp_path / f"v{suffix}", ramp(count), source)
    clip = decode_clip(f"v{suffix}", _settings(tmp_path, wanted))
    assert clip.fps == wanted
    assert clip.frames.shape[1:] == (16, 16, 3) and clip.frames.dtype == np.uint8
    assert len(clip.frames) == -(-count * wanted // source)
    # Brightness is 8 per source frame, so it measures the time of what was taken.
    taken = np.asarray(_levels(clip.frames)) / 8 / source
    assert np.abs(taken - np.arange(len(taken)) / wanted).max() <= 0.5 / source + 0.3 / source


def test_a_slow_source_keeps_its_rate_and_all_of_its_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", ramp(12, step=20), 5)
    clip = decode_clip("v.mp4", _settings(tmp_path))
    assert clip.fps == 5
    assert np.abs(np.asarray(_levels(clip.frames)) - 20 * np.arange(12)).max() < 4


def test_gif_frames_follow_the_delays_of_the_file(tmp_path: Path) -> None:
    images = [Image.fromarray(frame) for frame in ramp(4, step=40)]
    # 100, 100, 400 and 100 ms: 3 delays over 600 ms are 5 fps on average.
    path = tmp_path / "v.gif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=[100, 100, 400, 100])
    clip = decode_clip("v.gif", _settings(tmp_path, 8.0))
    assert clip.fps == pytest.approx(5, rel=0.2)
    assert set(np.round(np.asarray(_levels(clip.frames)) / 40).astype(int).tolist()) <= {0, 1, 2, 3}
    steady = decode_clip(write_video(tmp_path / "s.gif", ramp(20), 10).name, _settings(tmp_path, 5.0))
    assert steady.fps == 5
    assert np.abs(np.asarray(_levels(steady.frames)) - 16 * np.arange(10)).max() < 2


def test_folder_of_frames_is_in_natural_order(tmp_path: Path) -> None:
    names = ["f1.png", "f2.jpg", "f10.png", "f11.JPEG"]
    write_frames(tmp_path / "clip", ramp(4, step=50), names)
    (tmp_path / "clip" / "notes.txt").write_text("no frame")
    clip = decode_clip("clip", _settings(tmp_path, 8.0, folder_fps=4.0))
    assert clip.fps == 4
    assert np.abs(np.asarray(_levels(clip.frames)) - [0, 50, 100, 150]).max() < 2
    half = decode_clip("clip", _settings(tmp_path, 2.0, folder_fps=4.0))
    assert half.fps == 2 and np.abs(np.asarray(_levels(half.frames)) - [0, 100]).max() < 2
    with pytest.raises(ClipError, match="--folder-fps"):
        decode_clip("clip", _settings(tmp_path))


def test_an_image_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    Image.fromarray(ramp(1, start=77)[0]).save(tmp_path / "a.png")
    clip = decode_clip("a.png", _settings(tmp_path))
    assert _levels(clip.frames) == [77.0]


def test_scaling_keeps_the_center_and_the_shape(tmp_path: Path) -> None:
    # A wide frame: black margins of a quarter, a white middle of exactly the crop.
    pixels = np.zeros((2, 32, 64, 3), dtype=np.uint8)
    pixels[:, :, 16:48] = 255
    pixels[:, :16, 16:48, 2] = 0
    write_video(tmp_path / "v.mkv", pixels, 8)
    frame = decode_clip("v.mkv", _settings(tmp_path)).frames[0]
    # The filter reaches a little over the edge of the crop.
    assert frame[:, 1:-1, 0].min() > 250 and frame[..., 0].min() > 230
    assert frame[:6, :, 2].max() < 10 and frame[10:, 1:-1, 2].min() > 245


def test_downscaling_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    stripes[:, :, ::2] = 255
    write_video(tmp_path / "v.mkv", stripes, 8)
    frame = decode_clip("v.mkv", _settings(tmp_path)).frames[0]
    assert np.abs(frame[2:-2, 2:-2].astype(int) - 127).max() < 20


def test_a_phone_video_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((4, 32, 48, 3), dtype=np.uint8)
    pixels[:, :, :24] = 255
    path = write_video(tmp_path / "v.mp4", pixels, 8)
    raw = bytearray(path.read_bytes())
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    place = raw.find(identity, raw.find(b"tkhd"))
    assert place > 0
    raw[place : place + len(identity)] = clockwise
    path.write_bytes(raw)
    frame = decode_clip("v.mp4", _settings(tmp_path)).frames[0]
    # The white left half of the stored picture is the top of the shown one.
    assert frame[:6].min() > 240 and frame[10:].max() < 15


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_truncated_videos_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = write_video(tmp_path / f"v{suffix}", ramp(30), 10)
    decode_clip(path.name, _settings(tmp_path))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ClipError, match="truncated|cannot be decoded|empty|not an mp4"):
        decode_clip(path.name, _settings(tmp_path))


@pytest.mark.parametrize(("suffix", "place"), [(".mp4", 0.4), (".webm", 0.5), (".mkv", 0.3)])
def test_damaged_videos_are_refused(tmp_path: Path, suffix: str, place: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, 8, 12, 3), np.uint8)
    picture = np.kron(noise, np.ones((1, 4, 4, 1), np.uint8))
    path = write_video(
        tmp_path / f"v{suffix}", np.concatenate([np.roll(picture, k, 2) for k in range(24)]), 8
    )
    raw = bytearray(path.read_bytes())
    first = int(place * len(raw))
    raw[first : first + 60] = np.random.default_rng(1).integers(0, 256, 60, np.uint8).tobytes()
    path.write_bytes(raw)
    with pytest.raises(ClipError, match="cannot be decoded|damaged"):
        decode_clip(path.name, _settings(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello, I am a text file", "not an mp4"),
        (b"#EXTM3U\n#EXTINF:1,\nother.mp4\n", "not an mp4"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not an mp4"),
    ],
)
def test_play_lists_and_other_files_named_mp4_are_not_opened(
    tmp_path: Path, content: bytes, message: str
) -> None:
    write_video(tmp_path / "other.mp4", ramp(4), 8)
    (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(ClipError, match=message):
        decode_clip("v.mp4", _settings(tmp_path))


def test_paths_that_are_no_files_of_the_root_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_video(tmp_path / "outside.mp4", ramp(4), 8)
    write_frames(root / "frames", ramp(2), ["0.png", "1.png"])
    (root / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (root / "frames" / "2.png").symlink_to(tmp_path / "outside.mp4")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    os.mkfifo(root / "pipe.mp4")
    for name, reason in {
        "link.mp4": "leads out",
        "frames": "leads out",
        "pipe.mp4": "neither a regular",
    }.items():
        with pytest.raises(ClipError, match=reason):
            decode_clip(name, _settings(root, folder_fps=8.0))
    with pytest.raises(ClipError, match="cannot be opened|no such file"):
        decode_clip("loop.mp4", _settings(root))
    with pytest.raises(ClipError, match=r"no such file \(looked for .*gone\.mp4"):
        decode_clip("gone.mp4", _settings(root))
    assert len(decode_clip("link.mp4", _settings(root, allow_absolute=True)).frames) == 4


def test_limits_on_frames_and_pixels(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", ramp(20), 10)
    Image.fromarray(ramp(1)[0]).save(tmp_path / "a.png")
    assert len(decode_clip("v.mp4", _settings(tmp_path, max_frames=16)).frames) == 16
    with pytest.raises(ClipError, match="16 frames at 8 fps, more than --max-frames 15"):
        decode_clip("v.mp4", _settings(tmp_path, max_frames=15))
    for name in ("v.mp4", "a.png"):
        with pytest.raises(ClipError, match="48x32 exceed --max-pixels 1535"):
            decode_clip(name, _settings(tmp_path, max_pixels=1535))


def test_a_file_with_sound_only_is_refused(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for _ in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ClipError, match="no video stream"):
        decode_clip("v.mp4", _settings(tmp_path))


def test_real_videos_keep_their_length() -> None:
    path = real_video("carphone_pristine.mp4")
    clip = decode_clip(path.name, _settings(path.parent))
    assert clip.fps == 8 and len(clip.frames) == 32  # 120 frames at 29.97 fps
    assert 20 < clip.frames.mean() < 235 and clip.frames.std() > 20


@given(
    count=st.integers(2, 60),
    source=st.floats(1, 60),
    fps=st.floats(0.5, 60),
    start=st.floats(-5, 5),
)
def test_sampling_takes_at_most_the_rate_of_the_source_and_covers_it(
    count: int, source: float, fps: float, start: float
) -> None:
    stamps = [round(start + k / source, 3) for k in range(count)]
    times = sample_times(stamps[0], stamps[-1], count, source, fps)
    rate = min(fps, source)
    assert len(times) <= count
    assert times[-1] > stamps[-1] - 1 / rate - 0.51 / source - 0.002
    picked = list(nearest_frames(zip(stamps, range(count), strict=True), times))
    assert len(picked) == len(times)
    for time, k in zip(times, picked, strict=True):
        assert abs(stamps[k] - time) <= min(abs(stamp - time) for stamp in stamps) + 1e-9
    if fps >= source:
        assert picked == list(range(count))


def test_nearest_frames_stops_asking_when_it_has_all() -> None:
    def endless():
        for k in range(1000):
            assert k < 5, "asked for frames that nobody needs"
            yield float(k), k

    assert list(nearest_frames(endless(), [0.0, 1.4, 1.6, 3.0])) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("frame", "out", "aspect", "box"),
    [
        ((100, 50), (10, 10), 1.0, (25, 0, 75, 50)),
        ((50, 100), (10, 10), 1.0, (0, 25, 50, 75)),
        ((50, 100), (10, 10), 2.0, (0, 0, 50, 100)),
        ((720, 576), (16, 9), 16 / 15, (0, 72, 720, 504)),
    ],
)
def test_center_box_is_the_largest_of_the_shape(frame, out, aspect, box) -> None:
    assert center_box(*frame, *out, aspect) == pytest.approx(box)
