"""Frames to grids of discrete codes and back: a small convolutional autoencoder.

A frame tokenizer is a folder with `tokenizer.json` (configuration, fingerprint) and
`model.safetensors`. Codes are row-major, one per `downsample` x `downsample` pixels. Once
trained, the network normalizes nothing over space: a code depends on the pixels around it only, so
that a moving object changes few codes.

Dimensions: B frames, H/W pixels, h/w code grid, C channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, Protocol

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacog.errors import ConfigError, DataError
from megacog.runtime.files import FolderKind
from megacog.runtime.tensor_files import save_tensors
from megacog.tokenizers.description import read_description
from megacog.tokenizers.quantizers import EMAVQ, FSQ, Quantized

FORMAT = "megacog-frame-tokenizer"
KIND = FolderKind("tokenizer.json", FORMAT)
VERSION = 1
ARCHITECTURE = "conv"
# Pixels of one forward pass. Frames are coded in groups of one fixed size (the last one padded), because
# convolution libraries choose their algorithm, and with it the rounding, by the size of the batch.
_GROUP_PIXELS = 16 * 32 * 32


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

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Returns uint8 frames [B, H, W, 3] of codes int64 [B, h, w]."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the code grid (h, w) of frames of this size."""


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


class ConvTokenizer(nn.Module):
    """Encoder, quantizer and decoder; implements `FrameTokenizer`."""

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

    @property
    def fingerprint(self) -> str:
        """sha256 over configuration and weights, as hex."""
        return _fingerprint(self.config, self.state_dict())

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the code grid (h, w) of frames of this size.

        Raises:
            DataError: a side is not a multiple of the downsampling.
        """
        if height < 1 or width < 1 or height % self.downsample or width % self.downsample:
            raise DataError(
                f"frames of {height}x{width} pixels do not divide into codes of {self.downsample}x"
                f"{self.downsample}; resize or crop them to multiples of {self.downsample}"
            )
        return height // self.downsample, width // self.downsample

    @torch.inference_mode()
    def encode(self, frames_BHWC: Tensor) -> Tensor:
        """Returns codes int64 [B, h, w], on the tokenizer's device, the same whatever the batch.

        Raises:
            DataError: frames are not uint8 [B, H, W, 3] or do not divide into codes.
        """
        if frames_BHWC.dtype != torch.uint8 or frames_BHWC.ndim != 4 or frames_BHWC.shape[-1] != 3:
            raise DataError(f"frames must be uint8 [B, H, W, 3], not {frames_BHWC.dtype} {list(frames_BHWC.shape)}")
        height, width = frames_BHWC.shape[1:3]
        h, w = self.grid(height, width)
        codes = [
            self.quantizer(self.encoder(pixels_of_frames(group))).codes_Bhw[:size]
            for group, size in self._groups(frames_BHWC, height * width)
        ]
        return torch.cat(codes) if codes else torch.empty((0, h, w), dtype=torch.int64, device=self._device)

    @torch.inference_mode()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Returns uint8 frames [B, H, W, 3], on the tokenizer's device.

        Raises:
            DataError: codes are not integers [B, h, w] or lie outside the codebook.
        """
        if codes_Bhw.ndim != 3 or codes_Bhw.dtype.is_floating_point or codes_Bhw.dtype.is_complex:
            raise DataError(f"codes must be integers [B, h, w], not {codes_Bhw.dtype} {list(codes_Bhw.shape)}")
        codes_Bhw = codes_Bhw.to(torch.int64)
        if codes_Bhw.numel() and not 0 <= int(codes_Bhw.min()) <= int(codes_Bhw.max()) < self.codebook_size:
            raise DataError(
                f"codes {int(codes_Bhw.min())}..{int(codes_Bhw.max())} are outside the codebook of "
                f"{self.codebook_size}; they come from another tokenizer or from damaged data"
            )
        height, width = (side * self.downsample for side in codes_Bhw.shape[1:])
        frames = [
            frames_of_pixels(self.decoder(self.quantizer.vectors(group)))[:size]
            for group, size in self._groups(codes_Bhw, height * width)
        ]
        empty = torch.empty((0, height, width, 3), dtype=torch.uint8, device=self._device)
        return torch.cat(frames) if frames else empty

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _groups(self, batch: Tensor, pixels: int) -> list[tuple[Tensor, int]]:
        """Returns (group of a fixed size on the device, real items in it) covering the batch."""
        group_size = max(1, _GROUP_PIXELS // pixels)
        groups = []
        for group in batch.split(group_size):
            missing = group_size - len(group)
            padded = torch.cat([group, group.new_zeros((missing, *group.shape[1:]))]) if missing else group
            groups.append((padded.to(self._device), len(group)))
        return groups


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
    kind = (stored.get("format"), stored.get("version"), stored.get("architecture"))
    if kind != (FORMAT, VERSION, ARCHITECTURE):
        raise DataError(
            f"{path}: format, version, architecture {list(kind)}, "
            f"expected {[FORMAT, VERSION, ARCHITECTURE]}; "
            "train a frame tokenizer with launch/train_tokenizer.py frames"
        )
    try:
        values = {**stored["config"], "levels": tuple(stored["config"]["levels"])}
        tokenizer = ConvTokenizer(ConvTokenizerConfig(**values))
    except (KeyError, TypeError, ConfigError) as error:
        raise DataError(f"{path}: bad configuration ({error}); the file is damaged") from error
    _load_weights(tokenizer, folder / "model.safetensors")
    if tokenizer.fingerprint != stored.get("fingerprint"):
        raise DataError(
            f"{folder}: weights and configuration do not match the recorded fingerprint; one of the files "
            "was changed or damaged. Copy both again or retrain"
        )
    return tokenizer.eval().requires_grad_(False).to(device)


def write_frame_tokenizer(folder: Path, tokenizer: ConvTokenizer) -> None:
    """Writes tokenizer.json and model.safetensors into an existing folder (the caller makes it atomic)."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.state_dict().items()}
    save_tensors(weights, folder / "model.safetensors")
    stored = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": ARCHITECTURE,
        "codebook_size": tokenizer.codebook_size,
        "config": asdict(tokenizer.config),
        "fingerprint": tokenizer.fingerprint,
    }
    (folder / "tokenizer.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def _load_weights(tokenizer: ConvTokenizer, path: Path) -> None:
    try:
        weights = safetensors.torch.load_file(path)
        tokenizer.load_state_dict(weights)
    except OSError as error:
        raise DataError(f"{path}: {error}; a frame tokenizer has two files") from error
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise DataError(f"{path}: damaged or of another configuration ({error}); copy it again or retrain") from error


def _fingerprint(config: ConvTokenizerConfig, weights: Mapping[str, Tensor]) -> str:
    described = {"architecture": ARCHITECTURE, **{f.name: getattr(config, f.name) for f in fields(config)}}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
