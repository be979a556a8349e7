"""Measures an import: gigabytes per second and the most anonymous memory, on random weights of the original's format.

    python launch/benchmark.py import --layers 24 --folder /scratch

Anonymous memory is what a process cannot give back: pages of mapped files are not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megacog.checkpoint.export import open_export, save_export
from megacog.config.schema import Config, ModelConfig, TokenizerConfig, TrainConfig
from megacog.interop.exporting import export_sat
from megacog.model.init import whole_shape
from megacog.model.transformer import CogVideo
from megacog.runtime.cli import run
from megacog.runtime.hardware import describe_device
from megacog.runtime.tensor_files import Deferred

_POLL_SECONDS = 0.01
_IMPORT = "from megacog.commands import convert; convert()"


@dataclass(frozen=True)
class Measured:
    """One import."""

    gigabytes: float
    """Of weights, 1e9 bytes."""
    seconds: float
    """Of the whole command, with the comparison of logits."""
    anonymous_gigabytes: float
    """The most anonymous memory of the process at any time."""
    report: str
    """What the command printed."""


def measure(model: ModelConfig, folder: Path, ranks: int = 1) -> Measured:
    """Write a sequential stage's checkpoint of random fp16 weights in `folder` and import it in a process of its own.

    Raises:
        EnvError: There is too little disk space: three times the weights are needed for a while.
        subprocess.CalledProcessError: The import failed.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made, source, out = (Path(scratch) / name for name in ("made", "source", "out"))
        size = _random_export(model, made)
        export_sat(open_export(made), source, "sequential", ranks, iteration=1)
        command = [sys.executable, "-c", _IMPORT, "import-sat", str(source), "--out", str(out)]
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        anonymous = 0
        while process.poll() is None:
            anonymous = max(anonymous, _anonymous_bytes(process.pid))
            time.sleep(_POLL_SECONDS)
        seconds = time.monotonic() - start
        assert process.stdout is not None
        report = process.stdout.read()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return Measured(size / 1e9, seconds, anonymous / 1e9, report)


def _random_export(model: ModelConfig, path: Path) -> int:
    """Write an export with random weights, one tensor at a time; its bytes."""
    with torch.device("meta"):
        parameters = dict(CogVideo(model, ("sequential",)).named_parameters())
    tensors: dict[str, Tensor | Deferred] = {
        name: Deferred(torch.float16, tuple(shape), partial(_random, tuple(shape)))
        for name, shape in ((name, whole_shape(parameter, 1)) for name, parameter in parameters.items())
    }
    config = Config(
        model=model, tokenizer=TokenizerConfig(text="none", frames="none"),
        train=TrainConfig(stage="base", run_dir="none", steps=1, global_batch_size=1, micro_batch_size=1),
    )  # fmt: skip
    save_export(path, config, tensors, None, None)
    return sum(tensor.nbytes for tensor in tensors.values())


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float16).normal_(0, 0.02)


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0  # it has just ended
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def released_model(layers: int) -> ModelConfig:
    """The released model with fewer layers."""
    return ModelConfig(
        num_layers=layers, hidden_size=3072, num_heads=48, grid=(20, 20), image_vocab_size=20_000,
        text_vocab_size=130_010, boi_id=130_000, base_positions=1024, plus_positions=2000,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(prog="benchmark.py import", description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of the released model's 48; one is 0.3 GB (default 4)")
    parser.add_argument("--ranks", type=int, default=1, help="model-parallel ranks of the checkpoint: 1 or 2")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to write, three times the weights")
    options = parser.parse_args(argv)
    found = measure(released_model(options.layers), options.folder, options.ranks)
    print(json.dumps({
        "gigabytes": round(found.gigabytes, 2), "seconds": round(found.seconds, 1),
        "peak_anonymous_gigabytes": round(found.anonymous_gigabytes, 2), "device": describe_device(),
        "report": found.report.splitlines(),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    run(main)
