"""One small world for all commands, and a way to run them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import Command, TrainingArguments, call
from small_export import make_export
from tiny_run import make_inputs, settings, write_config
from tiny_videos import ramp, random_tokenizer, write_captions, write_video

from megacog.training import pretrain


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers and shards in inputs/, a finished base run in run/, an export in made/export, videos in videos/."""
    folder = tmp_path_factory.mktemp("world")
    inputs = make_inputs(folder / "inputs")
    values = settings(inputs, folder / "run", "base", engine="torch", steps=1, eval_every=0)
    assert pretrain.main(["--config", str(write_config(folder / "base.yaml", values))]) == 0
    (folder / "made").mkdir()
    make_export(folder / "made")
    random_tokenizer(folder / "tokenizer")
    write_video(folder / "videos/good.mp4", ramp(20), 8)
    (folder / "videos/broken.mp4").write_bytes((folder / "videos/good.mp4").read_bytes()[:700])
    (folder / "videos/text.mp4").write_text("no video at all")
    write_captions(folder / "videos/captions.csv", [("good.mp4", "a gray ramp")])
    (folder / "prompts.txt").write_text("the digit 3 moves left\n")
    (folder / "file").write_text("in the way")
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return partial(call, capsys)


@pytest.fixture
def training(world: Path, tmp_path: Path) -> TrainingArguments:
    """Writes a configuration whose keys `section__key` are changed; returns the arguments --config FILE."""

    def make(stage: str = "base", **changes: Any) -> tuple[str, Path]:
        values = settings(world / "inputs", tmp_path / "run", stage, engine="torch", steps=2, eval_every=0)
        for name, value in changes.items():
            section, _, key = name.partition("__")
            values.setdefault(section, {})[key] = value
        return "--config", write_config(tmp_path / "config.yaml", values)

    return make
