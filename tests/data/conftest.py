"""A small text tokenizer, shards and configurations for the data tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacog.config.schema import Config
from megacog.data.shards import ShardMeta, ShardWriter
from megacog.tokenizers.text import TextTokenizer, train_text_tokenizer

CODEBOOK = 16


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "text"
    captions = [f"the digit {digit} moves {way}" for digit in range(10) for way in ("left", "right")]
    train_text_tokenizer(captions, folder, 80)
    return folder


@pytest.fixture(scope="session")
def text(text_folder: Path) -> TextTokenizer:
    return TextTokenizer.load(text_folder)


@pytest.fixture
def write_clips(tmp_path: Path) -> Callable[..., Path]:
    """Writes a shard: clips are (id, frames, fps); code p of frame t is (clip + t + p) % 16."""

    def write(name: str, clips: Sequence[tuple[str, int, float]], **options: Any) -> Path:
        meta = ShardMeta(
            options.get("grid", (2, 2)),
            options.get("codebook_size", CODEBOOK),
            options.get("fingerprint", "f" * 64),
            "av",
            "{}",
            options.get("temporal_factor", 1),
        )
        captions = options.get("captions", {})
        token_ids = options.get("token_ids")
        with ShardWriter(tmp_path / name, meta, options.get("text_tokenizer")) as writer:
            for clip, (clip_id, frames, fps) in enumerate(clips):
                t, y, x = np.indices((frames, *meta.grid))
                codes = (clip + t + y * meta.grid[1] + x) % CODEBOOK
                caption = captions.get(clip_id, f"the digit {clip % 10} moves left")
                writer.add(clip_id, caption, codes, fps, token_ids)
        return tmp_path / name

    return write


@pytest.fixture
def make_config(text_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    """Builds a configuration; keyword arguments replace parts of its sections."""

    def make(
        train_data: Sequence[Path | dict[str, Any]], eval_data: Sequence[Path] = (), **sections: dict[str, Any]
    ) -> Config:
        def sources(entries: Sequence[Path | dict[str, Any]]) -> list[dict[str, Any]]:
            return [entry if isinstance(entry, dict) else {"path": str(entry)} for entry in entries]

        model = {
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "grid": (2, 2),
            "text_length": 24,
            "image_vocab_size": CODEBOOK,
            "text_vocab_size": 100,
            "inherit": "base",
        }
        train = {
            "stage": "sequential",
            "run_dir": str(tmp_path / "run"),
            "steps": 100,
            "global_batch_size": 8,
            "micro_batch_size": 2,
        }
        data = {"train": sources(train_data), "eval": sources(eval_data), "workers": 0}
        return Config.model_validate(
            {
                "model": {**model, **sections.get("model", {})},
                "tokenizer": {"text": str(text_folder), "frames": "none", **sections.get("tokenizer", {})},
                "generation": sections.get("generation", {}),
                "samples": sections.get("samples", {}),
                "data": {**data, **sections.get("data", {})},
                "train": {**train, **sections.get("train", {})},
            }
        )

    return make
