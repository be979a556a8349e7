from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_videos import random_tokenizer, real_video, write_captions

from megacog.data.shards import ShardMeta, ShardWriter
from megacog.errors import ConfigError, DataError
from megacog.prepare.inspect import ShardSet, code_usage, describe, statistics
from megacog.prepare.main import main
from megacog.prepare.verify import verify
from megacog.tokenizers.frames import load_frame_tokenizer

REAL = ("bikes.mp4", "carphone_distorted.mp4", "carphone_pristine.mp4")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_tokenizer(tmp_path_factory.mktemp("tokenizer") / "frames")


def _meta(tokenizer: Path, **changes: object) -> ShardMeta:
    fingerprint = load_frame_tokenizer(tokenizer).fingerprint
    return ShardMeta(
        **{
            "grid": (4, 4),
            "codebook_size": 240,
            "tokenizer_fingerprint": fingerprint,
            "decoder": "made up",
            "settings": "{}",
            **changes,
        }
    )


def _shard(path: Path, meta: ShardMeta, lengths: dict[str, int], codes: int = 8, fps: float = 8.0) -> Path:
    """Writes clips in which the codes 0..codes-1 are equally frequent."""
    with ShardWriter(path, meta) as writer:
        for clip_id, length in lengths.items():
            frames = (np.arange(length * 16) % codes).reshape(length, 4, 4)
            writer.add(clip_id, f"caption of {clip_id}", frames, fps)
    return path


def test_statistics_are_those_of_the_clips(tmp_path: Path, tokenizer: Path) -> None:
    meta = _meta(tokenizer)
    _shard(tmp_path / "s-00000-of-00002.h5", meta, {"a": 2, "b": 4}, fps=4.0)
    _shard(tmp_path / "s-00001-of-00002.h5", meta, {"long name": 6})
    with ShardSet([str(tmp_path / "s-*.h5")]) as shards:
        figures = statistics(shards)
        some = code_usage(shards, code_frames=4)
        spread = [(shard.path.name[2:7], clip) for shard, clip in shards.spread(3)]
    assert (figures["shards"], figures["clips"], figures["frames"]) == (2, 3, 12)
    assert figures["hours"] == pytest.approx((6 / 4 + 6 / 8) / 3600)
    assert figures["fps"] == {"4": 2, "8": 1}
    lengths = figures["frames_per_clip"]
    assert (lengths["min"], lengths["median"], lengths["mean"], lengths["max"]) == (2, 4, 4, 6)
    assert sum(lengths["counts"]) == 3 and lengths["counts"][0] == 1
    assert figures["caption_characters"]["max"] == len("caption of long name")
    assert figures["codes"] == {"frames_counted": 12, "used": 8, "perplexity": pytest.approx(8.0)}
    assert some["frames_counted"] == 4 and some["perplexity"] == pytest.approx(8.0)
    assert spread == [("00000", 0), ("00000", 1), ("00001", 0)]
    text = describe(figures)
    assert "3 clips, 12 frames" in text and "perplexity 8.0" in text and "codes used 8 of 240" in text


def test_one_clip_of_one_frame_can_be_described(tmp_path: Path, tokenizer: Path) -> None:
    _shard(tmp_path / "s.h5", _meta(tokenizer), {"a": 1}, codes=1)
    with ShardSet([str(tmp_path / "s.h5")]) as shards:
        figures = statistics(shards)
    assert figures["codes"]["perplexity"] == 1.0
    assert "1 clips, 1 frames" in describe(figures)


def test_sets_of_different_tokenizers_are_not_mixed(tmp_path: Path, tokenizer: Path) -> None:
    _shard(tmp_path / "a.h5", _meta(tokenizer), {"a": 2})
    _shard(tmp_path / "b.h5", _meta(tokenizer, tokenizer_fingerprint="other"), {"b": 2})
    with pytest.raises(DataError, match=r"b\.h5 has tokenizer_fingerprint other"):
        ShardSet([str(tmp_path / "a.h5"), str(tmp_path / "b.h5")])
    assert [
        "different frame tokenizers" in failure for failure in verify([str(tmp_path / "*.h5")]).failures
    ] == [True]


def test_the_sheet_shows_decoded_codes_and_checks_the_tokenizer(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _shard(tmp_path / "s.h5", _meta(tokenizer), {"a": 3, "b": 12})
    sheet = tmp_path / "sheet.png"
    arguments = ["inspect", str(path), "--sheet", str(sheet), "--frames", "4", "--clips", "2"]
    assert main([*arguments, "--tokenizer", str(tokenizer)]) == 0
    assert "contact sheet" in capsys.readouterr().out
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    frame = load_frame_tokenizer(tokenizer).decode(_codes(path, 0, 2))[0].numpy()
    # Third column of the first row; every pixel of the 16 x 16 frame is 6 x 6 on the sheet.
    left, top = 4 + 2 * 100, 4 + 2 * 18
    np.testing.assert_array_equal(pixels[top + 3 : top + 96 : 6, left + 3 : left + 96 : 6], frame)
    assert (pixels[4:40] < 128).any(), "no caption was drawn"
    assert (pixels[top : top + 96, 4 + 3 * 100 :] == 255).all(), "a clip of three frames has three pictures"
    other = random_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="was made with frame tokenizer"):
        main([*arguments, "--tokenizer", str(other)])
    with pytest.raises(ConfigError, match="--sheet needs --tokenizer"):
        main(arguments)
    assert main(["inspect", str(path), "--tokenizer", str(tokenizer)]) == 0
    with pytest.raises(DataError, match="was made with frame tokenizer"):
        main(["inspect", str(path), "--tokenizer", str(other)])
    with pytest.raises(DataError, match="no picture format"):
        main(["inspect", str(path), "--tokenizer", str(tokenizer), "--sheet", str(tmp_path / "sheet.doc")])


def _codes(path: Path, clip: int, frame: int):
    import torch

    from megacog.data.shards import Shard

    return torch.from_numpy(Shard(path).read(clip, [frame]).astype(np.int64))


def test_verify_names_every_fault_and_exits_with_one(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = _meta(tokenizer)
    good = _shard(tmp_path / "good.h5", meta, {"a": 2, "b": 40})
    twice = _shard(tmp_path / "twice.h5", meta, {"b": 2})
    flipped = _shard(tmp_path / "flipped.h5", meta, {"c": 40})
    cut = _shard(tmp_path / "cut.h5", meta, {"d": 40})
    assert main(["verify", str(good)]) == 0
    assert "1 shards, 2 clips, 42 frames: all intact" in capsys.readouterr().out
    frames = (np.arange(40 * 16) % 8).astype("<u2").tobytes()
    raw = bytearray(flipped.read_bytes())
    raw[raw.index(frames) + 33 * 32] ^= 1
    flipped.write_bytes(raw)
    cut.write_bytes(cut.read_bytes()[:-100])
    paths = [str(path) for path in (good, twice, flipped, cut, tmp_path / "gone.h5")]
    assert main(["verify", "--json", *paths]) == 1
    record = json.loads(capsys.readouterr().out)
    assert len(record["failures"]) == 4
    for part in ("gone.h5", "twice.h5: 1 clips are in", "frame 33 of clip 'c'", "cut.h5"):
        assert sum(part in failure for failure in record["failures"]) == 1, part


def test_real_videos_go_through_run_inspect_and_verify(
    tmp_path: Path, tokenizer: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = real_video(REAL[0]).parent
    captions = write_captions(tmp_path / "captions.csv", [(name, f"a video called {name}") for name in REAL])
    command = [sys.executable, str(repository / "launch" / "prepare.py"), "run", str(captions)]
    command += [
        "--out",
        str(tmp_path / "shards" / "real"),
        "--tokenizer",
        str(tokenizer),
        "--root",
        str(folder),
    ]
    command += ["--size", "16x24", "--workers", "2"]
    path = os.pathsep.join([str(repository), str(repository / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    # 10 s, 4 s and 4 s at 8 frames per second.
    assert "3 clips, 144 frames, 0.005 hours, 0 failed" in done.stdout
    assert "column 'video'" in done.stdout and "(found)" in done.stdout
    (shard,) = (tmp_path / "shards").glob("real-00000-of-00001.h5")
    sheet = tmp_path / "sheet.png"
    assert main(["inspect", str(shard), "--tokenizer", str(tokenizer), "--sheet", str(sheet), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["grid"] == [4, 6] and figures["fps"] == {"8": 3}
    assert figures["codes"]["used"] > 20 and math.isfinite(figures["codes"]["perplexity"])
    assert Image.open(sheet).size == (8 * (144 + 4) + 4, 3 * (36 + 96 + 8) + 4)
    assert main(["verify", str(shard)]) == 0


def test_the_rate_table_is_that_of_the_config(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = _shard(tmp_path / "s.h5", _meta(tokenizer), {"long": 33, "short": 9, "too short": 4})
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
model: {{num_layers: 1, hidden_size: 8, num_heads: 1, grid: [4, 4], image_vocab_size: 240, text_vocab_size: 8,
         inherit: base}}
tokenizer: {{text: t, frames: {tokenizer}}}
data: {{train: [{{path: {shards}}}], rates: {{series: [1, 2, 4, 8]}}}}
train: {{stage: sequential, run_dir: run, steps: 1, global_batch_size: 1, micro_batch_size: 1}}
"""
    )
    assert main(["inspect", "--config", str(config)]) == 0
    text = capsys.readouterr().out
    assert "clips x rates, stage sequential" in text and "none fits" in text
    assert [line.split()[1:3] for line in text.splitlines() if line.startswith("          0")][:2] == [
        ["1", "4.0"], ["2", "2.0"]
    ]  # fmt: skip
    assert main(["inspect", str(shards), "--config", str(config), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rates"]
    # Of 33 frames at 8 fps every 8th makes five at 1 fps, of 9 frames every 2nd; 4 frames never do.
    assert [(row["fps"], row["clips"], row["share"]) for row in rows] == [
        (1, 1, 0.5),
        (2, 1, 0),
        (4, 2, 0.5),
        (8, 2, 0),
        (None, 1, 0),
    ]
    with pytest.raises(ConfigError, match="name shards"):
        main(["inspect"])


def test_help_needs_no_heavy_package(repository: Path) -> None:
    code = (
        "import sys; from megacog.prepare.main import main\n"
        "try: main(['run', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'av', 'PIL', 'numpy', 'h5py'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--eval-fraction" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", ".."], "names no stem"),
        (["--out", "x", "--root", "/nonexistent/folder"], "is no folder"),
        (["--out", "x", "--video-column", "vide"], "--video-column video"),
    ],
)
def test_wrong_options_get_one_message(
    tmp_path: Path, tokenizer: Path, arguments: list[str], message: str
) -> None:
    captions = write_captions(tmp_path / "c.csv", [("a.mp4", "x")])
    with pytest.raises((ConfigError, DataError), match=message):
        main(["run", str(captions), "--tokenizer", str(tokenizer), *arguments])


def test_options_have_one_spelling_which_job_scripts_look_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "c.csv", "--out", "x", "--tokenizer", "t", "--overw"])
    assert "unrecognized arguments: --overw" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [["--fps", "0"], ["--fps", "nan"], ["--size", "3x"], ["--eval-fraction", "1"]]
)
def test_values_out_of_range_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "c.csv", "--out", "x", "--tokenizer", "t", *option])
    assert option[0] in capsys.readouterr().err
