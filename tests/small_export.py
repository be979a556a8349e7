"""A random export with real tokenizers: everything that generation needs, small enough for seconds on one core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_model import BOTH, build_model, model_config

from megacog.checkpoint.export import save_export
from megacog.config.schema import Config, ModelConfig
from megacog.prepare.digits import captions
from megacog.tokenizers.frames import ConvTokenizer, ConvTokenizerConfig, write_frame_tokenizer
from megacog.tokenizers.text import TextTokenizer, train_text_tokenizer


def make_export(
    folder: Path, plus: tuple[Any, ...] = BOTH, grid: tuple[int, int] = (4, 4), **generation: Any
) -> Path:
    """Write folder/export: 2 layers, width 32, a grid of codes of 4 x 4 pixels, 20 text tokens, demo captions."""
    text_folder, frame_folder = folder / "text", folder / "frames"
    train_text_tokenizer(captions(), text_folder, vocab_size=120, template="{span}s")
    text = TextTokenizer.load(text_folder)
    frame_folder.mkdir()
    torch.manual_seed(3)
    frames = ConvTokenizer(ConvTokenizerConfig(levels=(4, 4), width=8, blocks=0))
    write_frame_tokenizer(frame_folder, frames)
    model_settings = model_config(
        grid=grid, text_length=20, text_positions=20, image_vocab_size=frames.codebook_size,
        text_vocab_size=text.vocab_size, boi_id=text.boi_id,
    )  # fmt: skip
    return save_model(folder / "export", model_settings, plus, text_folder, frame_folder, **generation)


def save_model(
    path: Path, model: ModelConfig, plus: tuple[Any, ...], text: Path, frames: Path, **generation: Any
) -> Path:
    """Write an export of a random model of this shape."""
    train = {"stage": "base", "run_dir": "run", "steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    sections = {
        "model": model.model_dump(),
        "tokenizer": {"text": str(text), "frames": str(frames)},
        "train": train,
        "generation": generation,
    }
    tensors = dict(build_model(model, plus).named_parameters())
    save_export(path, Config.model_validate(sections), tensors, text, frames)
    return path
