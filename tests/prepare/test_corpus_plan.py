"""Plans tell the real sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megacog.data.shards import Shard, ShardMeta, ShardWriter
from megacog.errors import DataError
from megacog.prepare.main import main
from megacog.prepare.plan import assumed_shape, measured_shape, plan


def _write(path: Path, clips: int, grid: tuple[int, int], codebook: int, tokens: int = 0) -> Path:
    meta = ShardMeta(grid, codebook, "f" * 64, "av", "{}")
    with ShardWriter(path, meta, "t" * 64 if tokens else None) as writer:
        for clip in range(clips):
            codes = np.zeros((5, *grid), dtype=np.int64)
            writer.add(f"clip/{clip:06d}.mp4", "x" * 40, codes, 2.0, [1] * tokens if tokens else None)
    return path


@pytest.mark.parametrize(("clips", "grid", "codebook", "tokens"), [(300, (4, 5), 20_000, 0), (40, (2, 2), 1 << 17, 7)])
def test_the_plan_of_a_set_like_this_is_its_size(
    tmp_path: Path, clips: int, grid: tuple[int, int], codebook: int, tokens: int
) -> None:
    path = _write(tmp_path / "a.h5", clips, grid, codebook, tokens)
    made = plan(clips, measured_shape([str(path)]), clips)
    assert made.disk_bytes == pytest.approx(path.stat().st_size, abs=2048)
    assert (made.frames, made.shards, made.hours) == (5 * clips, 1, pytest.approx(5 * clips / 2 / 3600))
    if not tokens:
        assumed = assumed_shape(grid, codebook, seconds=2.0, fps=2.0, id_bytes=15, caption_bytes=40)
        assert plan(clips, assumed, clips) == made


def test_the_memory_of_an_index_is_that_of_its_arrays(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.h5", 300, (2, 2), 16)
    with Shard(path) as shard:
        arrays = [shard.num_frames, shard._first_frame, shard.fps, *shard.clip_ids.arrays, *shard.captions.arrays]
    made = plan(300, measured_shape([str(path)]), 300)
    training = 300 * (8 + 8 + 4 + 8)  # Source.lengths, Source.fps, kinds, usable clips
    assert made.index_bytes == pytest.approx(sum(array.nbytes for array in arrays) + training, abs=16)


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--clips", "5400000", "--clips-per-second", "100"]) == 0
    table = capsys.readouterr().out
    assert "178,200,000 (33.0 per clip)" in table and "540 files of 266.6 MB" in table
    assert "time to prepare      15.0 hours (0.6 days)" in table and "256 at most" in table
    path = _write(tmp_path / "a.h5", 3, (2, 2), 16)
    assert main(["plan", "--clips", "30", "--like", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 150
    assert main(["plan", "--clips", "30"]) == 0
    assert "give --clips-per-second" in capsys.readouterr().out
    with pytest.raises(DataError, match="hold no clips"):
        main(["plan", "--clips", "30", "--like", str(_write(tmp_path / "b.h5", 0, (2, 2), 16))])
