"""`launch/train_tokenizer.py`: train a frame or text tokenizer, or show a trained one."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacog.errors import ConfigError, DataError
from megacog.prepare import train_text
from megacog.runtime.files import require_place
from megacog.runtime.log import setup


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="train_tokenizer.py", description="Train the tokenizers of your own corpus, or show a trained one."
    )
    commands = parser.add_subparsers(required=True)
    _add_frames_parser(commands)
    train_text.add_parser(commands)
    show_parser = commands.add_parser("show", help="print what a tokenizer folder holds")
    show_parser.add_argument("folder", type=Path)
    show_parser.set_defaults(command=show)
    settings = parser.parse_args(argv)
    setup()
    return settings.command(settings)


def _add_frames_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "frames",
        help="train the frame tokenizer on folders of videos",
        description="Interrupt it at any time: the same command continues and ends with the same weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("videos", type=Path, nargs="+", help="folders of videos, GIFs or folders of frames; or files")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--force", action="store_true", help="replace an existing frame tokenizer")
    parser.add_argument("--restart", action="store_true", help="forget an unfinished run")

    frames = parser.add_argument_group("frames")
    frames.add_argument("--size", type=_size, default=(32, 32), help="pixels: one side of a square, or HxW")
    frames.add_argument("--fps", type=float, default=8.0, help="rate at which videos are sampled")
    frames.add_argument("--heldout", type=Path, nargs="+", help="videos to report on instead of a share of VIDEOS")
    frames.add_argument("--heldout-fraction", type=float, default=0.05, help="share of VIDEOS to report on")
    frames.add_argument("--max-videos", type=int, default=1000, help="sample larger collections down to this many")
    frames.add_argument("--frames-per-video", type=int, default=32, help="longest run of frames taken from a video")
    frames.add_argument("--workers", type=int, default=2, help="decoder processes")

    model = parser.add_argument_group("model")
    model.add_argument("--downsample", type=int, default=4, help="pixels per code along each axis: 2, 4, 8, 16")
    model.add_argument("--quantizer", choices=("fsq", "ema_vq"), default="fsq")
    model.add_argument("--levels", type=_levels, default=(8, 5, 5), help="fsq: values per channel, e.g. 8,5,5")
    model.add_argument("--codebook-size", type=int, default=512, help="ema_vq: codes")
    model.add_argument("--code-dim", type=int, default=16, help="ema_vq: channels of a code")
    model.add_argument("--width", type=int, default=16, help="channels at full resolution")
    model.add_argument("--blocks", type=int, default=1, help="residual blocks per level")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=500)
    training.add_argument("--batch", type=int, default=32, help="frames per step (pairs of neighbors in time)")
    training.add_argument("--learning-rate", type=float, default=4e-3)
    training.add_argument("--temporal-weight", type=float, default=0.5)
    training.add_argument(
        "--perceptual-weights", type=Path, help="safetensors with VGG16 features and LPIPS layers; none = no such loss"
    )
    training.add_argument("--perceptual-weight", type=float, default=0.1)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    training.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.set_defaults(command=train_frames)


def train_frames(settings: argparse.Namespace) -> int:
    """Trains the frame tokenizer, writes its folder with report and picture, prints the report."""
    # Imported here: --help and `show` need neither torch's optimizers nor decoder processes.
    import torch

    from megacog.prepare.frame_pool import (
        PoolSettings,
        choose_videos,
        list_videos,
        load_pool,
        split_heldout,
    )
    from megacog.prepare.frame_report import measure, write_picture
    from megacog.prepare.perceptual import PerceptualLoss
    from megacog.prepare.train_frames import (
        FrameTrainer,
        FrameTraining,
        remove_partial,
        run_training,
        training_identity,
    )
    from megacog.runtime.files import atomic_directory, sha256_file
    from megacog.runtime.hardware import usable_device
    from megacog.tokenizers.frames import KIND, ConvTokenizerConfig, write_frame_tokenizer

    _check(settings)
    usable_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    training = FrameTraining(
        tokenizer=ConvTokenizerConfig(
            downsample=settings.downsample,
            quantizer=settings.quantizer,
            levels=settings.levels,
            codebook_size=settings.codebook_size,
            code_dim=settings.code_dim,
            width=settings.width,
            blocks=settings.blocks,
        ),
        steps=settings.steps,
        batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        temporal_weight=settings.temporal_weight,
        perceptual_weight=settings.perceptual_weight,
        seed=settings.seed,
    )
    height, width = settings.size
    if height % settings.downsample or width % settings.downsample:
        raise ConfigError(f"--size {height}x{width} is not a multiple of --downsample {settings.downsample}")
    pool_settings = PoolSettings(
        height=height,
        width=width,
        fps=settings.fps,
        max_videos=settings.max_videos,
        frames_per_video=settings.frames_per_video,
        seed=settings.seed,
        workers=settings.workers,
    )
    perceptual, perceptual_sha256 = None, None
    if settings.perceptual_weights is not None:
        perceptual = PerceptualLoss.load(settings.perceptual_weights).to(settings.device)
        perceptual_sha256 = sha256_file(settings.perceptual_weights)
    videos = list_videos(settings.videos)
    if settings.heldout is None:
        videos, heldout_videos = split_heldout(videos, settings.heldout_fraction)
    else:
        heldout_videos = list_videos(settings.heldout)
    videos, heldout_videos = choose_videos(videos, pool_settings), choose_videos(heldout_videos, pool_settings)
    pool = load_pool(videos, pool_settings, "reading videos")
    heldout = load_pool(heldout_videos, pool_settings, "reading held-out videos")
    identity = {**training_identity(training), "frames_sha256": _frames_sha256(pool), "perceptual": perceptual_sha256}
    if settings.restart:
        remove_partial(settings.out)
    trainer = FrameTrainer(training, pool, perceptual, settings.device)
    run_training(trainer, settings.out, identity)
    tokenizer = trainer.tokenizer.eval()
    tokenizer.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    report: dict[str, Any] = {
        **measure(tokenizer, heldout),
        "steps": training.steps,
        "training_frames": len(pool),
        "training_videos": len(videos),
        "heldout_videos": len(heldout_videos),
        "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "fingerprint": tokenizer.fingerprint,
    }
    with atomic_directory(settings.out, KIND if settings.force else None) as folder:
        write_frame_tokenizer(folder, tokenizer)
        write_picture(folder / "reconstruction.png", tokenizer, heldout)
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    remove_partial(settings.out)
    print(
        f"frame tokenizer in {settings.out}: held-out PSNR {report['psnr_db']} dB, perplexity {report['perplexity']} "
        f"of {report['codebook_size']}, {100 * report['used_codes_share']:.0f} % of codes used"
    )
    return 0


def show(settings: argparse.Namespace) -> int:
    """Prints a text or frame tokenizer's description and report as JSON, after checking its files."""
    from megacog.tokenizers.description import read_description
    from megacog.tokenizers.frames import load_frame_tokenizer
    from megacog.tokenizers.text import TextTokenizer

    folder: Path = settings.folder
    if (folder / "text.json").is_file():
        text = TextTokenizer.load(folder)
        described: dict[str, Any] = json.loads((folder / "text.json").read_text(encoding="utf-8"))
        described["vocab_size"] = text.vocab_size
    elif (folder / "tokenizer.json").is_file():
        load_frame_tokenizer(folder)
        described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    else:
        raise DataError(f"{folder}: neither a text tokenizer (text.json) nor a frame tokenizer (tokenizer.json)")
    report = folder / "report.json"
    if report.is_file():
        described["report"] = read_description(report, "text" if (folder / "text.json").is_file() else "frame")
    print(json.dumps(described, indent=1, ensure_ascii=False))
    return 0


def _check(settings: argparse.Namespace) -> None:
    """Raises ConfigError for values that argparse lets through, before anything takes time."""
    from megacog.tokenizers.frames import KIND

    for name in ("max_videos", "frames_per_video", "workers", "fps"):
        if not getattr(settings, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive, not {getattr(settings, name)}")
    if settings.threads is not None and settings.threads < 1:
        raise ConfigError(f"--threads must be at least 1, not {settings.threads}")
    for name in ("temporal_weight", "perceptual_weight", "seed"):
        if not 0 <= getattr(settings, name) < 2**63:
            raise ConfigError(f"--{name.replace('_', '-')} must not be negative, not {getattr(settings, name)}")
    if not 0 < settings.heldout_fraction < 1:
        raise ConfigError(f"--heldout-fraction must lie between 0 and 1, not {settings.heldout_fraction}")
    require_place(settings.out, KIND, settings.force)


def _frames_sha256(pool: Any) -> str:
    return hashlib.sha256(pool.frames_NHWC.numpy().tobytes()).hexdigest()


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor HxW")
    return int(sides[0]), int(sides[-1])


def _levels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(level) for level in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 8,5,5") from None
