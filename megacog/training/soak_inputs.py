"""Everything a tiny training run needs, made in a second: tokenizers, shards and a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megacog.data.shards import ShardMeta, ShardWriter
from megacog.runtime.files import atomic_directory
from megacog.tokenizers.frames import ConvTokenizer, ConvTokenizerConfig, write_frame_tokenizer
from megacog.tokenizers.text import train_text_tokenizer

GRID = (4, 4)
CODEBOOK = 24
CAPTIONS = [f"the digit {digit} moves {way}" for digit in range(10) for way in ("left", "right", "up", "down")]


def make_inputs(folder: Path) -> Path:
    """Tokenizers in `folder/text` and `folder/frames`, shards train.h5 and eval.h5; returns `folder`."""
    train_text_tokenizer(CAPTIONS, folder / "text", 96)
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(ConvTokenizerConfig(levels=(4, 3, 2), width=8, blocks=1))
    with atomic_directory(folder / "frames") as frames:
        write_frame_tokenizer(frames, tokenizer)
    meta = ShardMeta(GRID, CODEBOOK, tokenizer.fingerprint, decoder="none", settings="{}")
    generator = np.random.default_rng(0)
    for name, count in (("train", 40), ("eval", 8)):
        with ShardWriter(folder / f"{name}.h5", meta) as writer:
            for clip in range(count):
                start = generator.integers(0, CODEBOOK)  # learnable: the next cell and the next frame add one
                codes = (start + np.arange(17)[:, None, None] + np.arange(16).reshape(GRID)) % CODEBOOK
                writer.add(f"{name}-{clip}", CAPTIONS[clip % len(CAPTIONS)], codes, fps=8.0)
    return folder


def settings(inputs: Path, run_dir: Path, stage: str = "sequential", **train: Any) -> dict[str, Any]:
    """A configuration as plain values; `train` overrides keys of its train section."""
    return {
        "model": {
            "num_layers": 2, "hidden_size": 32, "num_heads": 4, "grid": list(GRID), "text_length": 24,
            "text_positions": 32, "image_vocab_size": CODEBOOK, "text_vocab_size": 96,
            "attention": {"interpolation": {"kind": "shifted_window", "window": [2, 2]}},
        },
        "tokenizer": {"text": str(inputs / "text"), "frames": str(inputs / "frames")},
        "data": {
            "train": [{"path": str(inputs / "train.h5")}], "eval": [{"path": str(inputs / "eval.h5")}], "workers": 0,
        },
        "train": {
            "stage": stage, "run_dir": str(run_dir), "steps": 8, "global_batch_size": 8, "micro_batch_size": 2,
            "precision": "fp32", "learning_rate": 1e-2, "warmup_steps": 2, "eval_every": 4, "eval_batches": 2,
            "threads": 1, "weight_decay": 0.01,
        } | train,
        "checkpoint": {"every": 4},
        "metrics": {"tensorboard": False},
    }  # fmt: skip


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """Write a configuration as YAML; returns its path."""
    path.write_text(yaml.safe_dump(values))
    return path
