"""Frames to grids of discrete codes and back: the protocol, the folder, a small convolutional autoencoder.

A frame tokenizer is a folder with `tokenizer.json` (architecture, configuration, fingerprint) and
`model.safetensors`. Codes are row-major, one per `downsample` x `downsample` pixels. Once trained, the
convolutional network (our own) normalizes nothing over space: a code depends on the pixels around it only,
so that a moving object changes few codes. icetk's network is in `icetk_vqvae.py`.

Dimensions: B frames, H/W pixels, h/w code grid, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacog.errors import ConfigError, DataError
from megacog.runtime.files import FolderKind
from megacog.runtime.tensor_files import save_tensors
from megacog.tokenizers.coding import CodingModule
from megacog.tokenizers.description import read_description
from megacog.tokenizers.icetk_vqvae import IcetkVqvae, IcetkVqvaeConfig
from megacog.tokenizers.quantizers import EMAVQ, FSQ, Quantized

FORMAT = "megacog-frame-tokenizer"
KIND = FolderKind("tokenizer.json", FORMAT)
VERSION = 1


class FrameTokenizer(Protocol):
    """What the rest of megacog knows of a frame tokenizer."""

    codebook_size: int
    downsample: int
    """Pixels per code along each axis."""

    @property
    def fingerprint(self) -> str:
        """sha256 over weights and configuration, as hex."""

    def encode(self, frames_BHWC: Tensor) -> Tensor:
        """Returns codes int64 [B, h, w] of uint8 frames [B, H, W, 3]."""

    def decode(self, codes_Bhw: Tensor, on_frames: Callable[[int], None] | None = None) -> Tensor:
        """Returns uint8 frames [B, H, W, 3] of codes int64 [B, h, w]; `on_frames` hears how many, as it goes."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the code grid (h, w) of frames of this size."""

    def codebook(self) -> Tensor:
        """Returns the vector of every code, float32 [codebook_size, D]: near ones decode to much the same."""


@dataclass(frozen=True)
class ConvTokenizerConfig:
    """Shape of the autoencoder; saved in tokenizer.json."""

    downsample: int = 4
    """Power of two."""
    quantizer: Literal["fsq", "ema_vq"] = "fsq"
    levels: tuple[int, ...] = (8, 5, 5)
    """fsq: values per code channel; the codebook is their product."""
    codebook_size: int = 512
    """ema_vq: rows of the codebook."""
    code_dim: int = 16
    """ema_vq: channels of a code vector."""
    width: int = 32
    """Channels at full resolution; deeper levels have 2, 3, 4 ... times as many."""
    blocks: int = 2
    """Residual blocks per level below full resolution, in encoder and decoder each."""

    def __post_init__(self) -> None:
        if self.downsample < 2 or self.downsample & (self.downsample - 1):
            raise ConfigError(f"downsample {self.downsample} must be a power of two, 2 or more")
        if self.quantizer not in ("fsq", "ema_vq"):
            raise ConfigError(f"quantizer {self.quantizer!r} must be fsq or ema_vq")
        if not self.levels or min(self.levels) < 2:
            raise ConfigError(f"levels {list(self.levels)} must each be at least 2")
        if self.codebook_size < 2:
            raise ConfigError(f"codebook_size {self.codebook_size} must be at least 2")
        if self.code_dim < 1 or self.width < 1 or self.blocks < 0:
            raise ConfigError("code_dim and width must be positive, blocks not negative")

    @property
    def channels(self) -> list[int]:
        """Channels per level, from full resolution down."""
        return [self.width * factor for factor in range(1, self.downsample.bit_length() + 1)]


class ResidualBlock(nn.Module):
    """x + conv1x1(silu(conv3x3(silu(x)))), an identity at the start of training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        for parameter in self.pointwise.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.pointwise(F.silu(self.spatial(F.silu(x_BCHW))))


def _encoder(config: ConvTokenizerConfig, code_dim: int) -> nn.Sequential:
    channels = config.channels
    layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 3, padding=1)]
    for outer, inner in zip(channels, channels[1:], strict=False):
        layers += [nn.SiLU(), nn.Conv2d(outer, inner, 4, stride=2, padding=1)]
        layers += [ResidualBlock(inner) for _ in range(config.blocks)]
    # Unit variance per code channel keeps the encoder where the quantizer's cells are: without it, mostly
    # blank frames drive it into saturation or to a single code.
    return nn.Sequential(
        *layers, nn.SiLU(), nn.Conv2d(channels[-1], code_dim, 1), nn.BatchNorm2d(code_dim, affine=False)
    )


def _decoder(config: ConvTokenizerConfig, code_dim: int) -> nn.Sequential:
    channels = config.channels[::-1]
    layers: list[nn.Module] = [nn.Conv2d(code_dim, channels[0], 3, padding=1)]
    for inner, outer in zip(channels, channels[1:], strict=False):
        layers += [ResidualBlock(inner) for _ in range(config.blocks)]
        layers += [nn.SiLU(), nn.Upsample(scale_factor=2, mode="nearest")]
        layers += [nn.Conv2d(inner, outer, 3, padding=1)]
    return nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(channels[-1], 3, 3, padding=1))


class ConvTokenizer(CodingModule):
    """Encoder, quantizer and decoder."""

    architecture = "conv"
    group_pixels = 16 * 32 * 32
    config: ConvTokenizerConfig

    def __init__(self, config: ConvTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.downsample = config.downsample
        self.quantizer: FSQ | EMAVQ
        if config.quantizer == "fsq":
            self.quantizer = FSQ(config.levels)
        else:
            self.quantizer = EMAVQ(config.codebook_size, config.code_dim)
        self.codebook_size = self.quantizer.codebook_size
        self.encoder = _encoder(config, self.quantizer.dim)
        self.decoder = _decoder(config, self.quantizer.dim)

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Quantized, Tensor]:
        """Returns (reconstruction, quantized, encoder output) of float pixels in -1..1, for training."""
        z_BDhw = self.encoder(pixels_BCHW)
        quantized = self.quantizer(z_BDhw)
        return self.decoder(quantized.vectors_BDhw), quantized, z_BDhw

    @property
    def code_norm(self) -> nn.BatchNorm2d:
        """The normalization in front of the quantizer; its running statistics belong to the weights."""
        norm = self.encoder[-1]
        assert isinstance(norm, nn.BatchNorm2d)
        return norm

    def codes_of_frames(self, frames_BHWC: Tensor) -> Tensor:
        """Returns codes int64 [B, h, w] of uint8 frames [B, H, W, 3]."""
        return self.quantizer(self.encoder(pixels_of_frames(frames_BHWC))).codes_Bhw

    def frames_of_codes(self, codes_Bhw: Tensor) -> Tensor:
        """Returns uint8 frames [B, H, W, 3] of int64 codes [B, h, w]."""
        return frames_of_pixels(self.decoder(self.quantizer.vectors(codes_Bhw)))

    @torch.no_grad()
    def codebook(self) -> Tensor:
        """Returns the vector of every code, float32 [codebook_size, D], on the tokenizer's device."""
        codes_1h1 = torch.arange(self.codebook_size, device=self._device)[None, :, None]
        return self.quantizer.vectors(codes_1h1)[0, :, :, 0].T


def pixels_of_frames(frames_BHWC: Tensor) -> Tensor:
    """Returns float32 [B, 3, H, W] in -1..1 of uint8 frames."""
    return frames_BHWC.movedim(-1, 1).to(torch.float32).contiguous() / 127.5 - 1.0


def frames_of_pixels(pixels_BCHW: Tensor) -> Tensor:
    """Returns uint8 frames [B, H, W, 3] of pixels in -1..1, clamped and rounded."""
    levels = ((pixels_BCHW.float() + 1.0) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).movedim(1, -1).contiguous()


def load_frame_tokenizer(folder: Path, device: str | torch.device = "cpu") -> FrameTokenizer:
    """Returns the frame tokenizer stored in `folder`, ready to encode and decode.

    Raises:
        DataError: a file is missing, damaged, or does not match its fingerprint.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    stored = read_description(path, "frame")
    kind = (stored.get("format"), stored.get("version"))
    architecture = stored.get("architecture")
    if kind != (FORMAT, VERSION) or architecture not in (ConvTokenizer.architecture, IcetkVqvae.architecture):
        raise DataError(
            f"{path}: format, version, architecture {[*kind, architecture]}, expected {[FORMAT, VERSION]} and "
            f"{ConvTokenizer.architecture} or {IcetkVqvae.architecture}; train a frame tokenizer with "
            "launch/train_tokenizer.py frames, or import icetk's with launch/convert.py import-icetk-frames"
        )
    try:
        tokenizer = _build(str(architecture), stored["config"])
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DataError(f"{path}: bad configuration ({error}); the file is damaged") from error
    _load_weights(tokenizer, folder / "model.safetensors")
    if tokenizer.fingerprint != stored.get("fingerprint"):
        raise DataError(
            f"{folder}: weights and configuration do not match the recorded fingerprint; one of the files "
            "was changed or damaged. Copy both again or retrain"
        )
    return tokenizer.eval().requires_grad_(False).to(device)


def write_frame_tokenizer(folder: Path, tokenizer: CodingModule) -> None:
    """Writes tokenizer.json and model.safetensors into an existing folder (the caller makes it atomic)."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.state_dict().items()}
    save_tensors(weights, folder / "model.safetensors")
    stored = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": tokenizer.architecture,
        "codebook_size": tokenizer.codebook_size,
        "config": asdict(tokenizer.config),
        "fingerprint": tokenizer.fingerprint,
    }
    (folder / "tokenizer.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def _build(architecture: str, config: dict[str, Any]) -> CodingModule:
    """Returns the network of a description, without weights."""
    if architecture == IcetkVqvae.architecture:
        with torch.device("meta"):
            return IcetkVqvae(IcetkVqvaeConfig(**config))
    return ConvTokenizer(ConvTokenizerConfig(**{**config, "levels": tuple(config["levels"])}))


def _load_weights(tokenizer: CodingModule, path: Path) -> None:
    try:
        tokenizer.load_state_dict(safetensors.torch.load_file(path), assign=True)
    except OSError as error:
        raise DataError(f"{path}: {error}; a frame tokenizer has two files") from error
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise DataError(f"{path}: damaged or of another configuration ({error}); copy it again or retrain") from error
