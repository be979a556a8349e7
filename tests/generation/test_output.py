"""Clips written as mp4, gif and contact sheet are readable, right in rate and color, and never half there."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from megacog.generation.output import (
    FrameSample,
    Strip,
    enlarge,
    mp4_stream,
    spread,
    watchable_scale,
    write_contact_sheet,
    write_gif,
    write_mp4,
)


def ramp(num_frames: int, height: int = 12, width: int = 14) -> np.ndarray:
    """Gray frames that get brighter, with a red left half."""
    frames = np.zeros((num_frames, height, width, 3), dtype=np.uint8)
    frames[:] = np.linspace(20, 230, num_frames).astype(np.uint8)[:, None, None, None]
    frames[:, :, : width // 2, 1:] = 0
    return frames


def read_mp4(path: Path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        rate = float(stream.average_rate or 0)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), rate


def test_an_mp4_holds_every_frame_at_its_rate_in_its_colors(tmp_path: Path) -> None:
    frames = ramp(9)
    write_mp4(tmp_path / "clip.mp4", frames, fps=8.0, scale=4)
    read, rate = read_mp4(tmp_path / "clip.mp4")
    assert read.shape == (9, 48, 56, 3) and rate == 8.0
    assert np.abs(read.astype(int) - enlarge(frames, 4)).mean() < 4


def test_odd_sizes_are_padded_and_streamed_parts_join(tmp_path: Path) -> None:
    frames = ramp(6, height=15, width=17)
    with mp4_stream(tmp_path / "clip.mp4", fps=2.5) as stream:
        stream.append(frames[:2])
        stream.append(frames[2:])
    read, rate = read_mp4(tmp_path / "clip.mp4")
    assert read.shape == (6, 16, 18, 3) and rate == 2.5


def test_an_error_on_the_way_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="sampling failed"), mp4_stream(tmp_path / "clip.mp4", fps=8) as stream:
        stream.append(ramp(3))
        raise RuntimeError("sampling failed")
    assert list(tmp_path.iterdir()) == []


def test_a_gif_loops_over_every_frame_and_keeps_its_length(tmp_path: Path) -> None:
    write_gif(tmp_path / "clip.gif", ramp(33), fps=8.0)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == 33 and image.info["loop"] == 0  # type: ignore[attr-defined]
        durations = []
        for index in range(33):
            image.seek(index)
            durations.append(image.info["duration"])
    assert sum(durations) == 4120  # 33 / 8 s, to a hundredth
    assert set(durations) == {120, 130}


def test_a_contact_sheet_shows_the_frames_in_order(tmp_path: Path) -> None:
    frames = ramp(5, 10, 10)
    write_contact_sheet(tmp_path / "sheet.png", [Strip("one\nline", frames), Strip("\u732b", frames[:2])], columns=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    # Two captions of 22 rows, three lines of frames of 10 + 4 rows, a margin.
    assert sheet.shape == (2 * 22 + 3 * 14 + 4, 3 * 14 + 4, 3)
    np.testing.assert_array_equal(sheet[22:32, 4:14], frames[0])
    np.testing.assert_array_equal(sheet[22:32, 18:28], frames[1])
    np.testing.assert_array_equal(sheet[36:46, 4:14], frames[3])
    np.testing.assert_array_equal(sheet[72:82, 18:28], frames[1])
    assert (sheet[:22] < 128).any()
    with pytest.raises(ValueError, match="at least one frame"):
        write_contact_sheet(tmp_path / "none.png", [])


def test_small_clips_are_enlarged_to_be_watchable() -> None:
    assert [watchable_scale(32, 32), watchable_scale(30, 90), watchable_scale(160, 160)] == [4, 5, 1]
    assert enlarge(np.arange(4).reshape(1, 2, 2, 1), 2)[0, :, :, 0].tolist() == [
        [0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3],
    ]  # fmt: skip


def test_a_sample_of_a_long_clip_is_even_and_bounded() -> None:
    sample = FrameSample(capacity=8)
    frames = np.arange(100, dtype=np.uint8)[:, None, None, None]
    for part in np.split(frames, 20):
        sample.append(part)
    assert sample.frames_THWC[:, 0, 0, 0].tolist() == list(range(0, 100, 16))
    assert sample.stride == 16
    assert spread(frames, 3)[:, 0, 0, 0].tolist() == [0, 50, 99]
    assert len(spread(frames[:2], 3)) == 2
