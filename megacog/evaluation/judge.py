"""A judge of moving-digit clips: which digit is in it, and which way does it move.

The digit is read by a small convolutional network on a crop around the ink of every frame; it is
trained on rendered clips of the `judge` scans only, which no training video and no test of the judge
contains. The direction needs no training: it is the straight line through the ink's center over time.

Tensor suffixes: B crops, T frames, H/W pixels, C channels, D digits.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from megacog.prepare import digits
from megacog.runtime.files import atomic_file
from megacog.runtime.log import get_logger
from megacog.runtime.progress import progress

CROP = 20
"""Side of the crop in pixels: a digit of 14 with room around it."""
# Gray below this is codec noise, not ink.
_INK_FLOOR = 0.15
# Sum of ink above the floor; a faint digit has about 10.
_LEAST_INK = 2.0
# Shorter ways than this are no motion; the slowest, shortest clip of the corpus moves 3.4 pixels.
_LEAST_WAY = 1.0
_logger = get_logger(__name__)


@dataclass(frozen=True)
class JudgeSettings:
    """How the digit network is trained; part of its cache key."""

    steps: int = 360
    batch_size: int = 112
    learning_rate: float = 5e-3
    clips_per_scan: int = 3
    frames_per_clip: int = 4
    seed: int = 20


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in one clip."""

    digit: int
    """From the frames' log probabilities, averaged over the clip."""
    direction: str | None
    """None: there is no motion, or no ink."""
    frame_digits_T: np.ndarray
    """The digit of every frame on its own, int64; -1 where there is no ink."""
    centers_T2: np.ndarray
    """Center of the ink (x, y) in pixels, NaN where there is none."""


class DigitNet(nn.Module):
    """Crops [B, 1, 20, 20] in 0..1 to digit logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * (CROP // 4) ** 2, 10),
        )  # fmt: skip

    def forward(self, crops_B1HW: Tensor) -> Tensor:
        return self.layers(crops_B1HW)


def ink(frames_THWC: np.ndarray) -> np.ndarray:
    """Gray level of every pixel, float32 [T, H, W] in 0..1, of uint8 RGB frames."""
    return frames_THWC.astype(np.float32).mean(axis=-1) / 255.0


def enlarge(frames_THWC: np.ndarray, scale: int) -> np.ndarray:
    """Frames with `scale` times the side, resampled as preparation does."""
    if scale == 1:
        return frames_THWC
    size = (frames_THWC.shape[2] * scale, frames_THWC.shape[1] * scale)
    resampled = (Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames_THWC)
    return np.stack([np.asarray(frame) for frame in resampled])


def shrink(frames_THWC: np.ndarray, scale: int) -> np.ndarray:
    """Frames with a `scale`-th of the side, each pixel the mean of its block; uint8 as they came."""
    if scale == 1:
        return frames_THWC
    T, H, W, C = frames_THWC.shape
    blocks = frames_THWC.reshape(T, H // scale, scale, W // scale, scale, C)
    return blocks.mean(axis=(2, 4)).round().astype(np.uint8)


def ink_centers(gray_THW: np.ndarray) -> np.ndarray:
    """Center (x, y) of each frame's ink in pixels, float64 [T, 2]; NaN where there is too little."""
    weight_THW = np.clip(gray_THW.astype(np.float64) - _INK_FLOOR, 0, None)
    total_T = weight_THW.sum(axis=(1, 2))
    y = (weight_THW.sum(axis=2) * (np.arange(gray_THW.shape[1]) + 0.5)).sum(axis=1)
    x = (weight_THW.sum(axis=1) * (np.arange(gray_THW.shape[2]) + 0.5)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        centers_T2 = np.stack([x, y], axis=1) / total_T[:, None]
    return np.where((total_T >= _LEAST_INK)[:, None], centers_T2, np.nan)


def direction_of(centers_T2: np.ndarray) -> str | None:
    """left, right, up or down: the way from the first to the last frame on the line that fits best.

    None if fewer than two frames have a center, or the way is shorter than a pixel.
    """
    times = np.flatnonzero(~np.isnan(centers_T2[:, 0]))
    if len(times) < 2:
        return None
    slope_2 = np.polyfit(times, centers_T2[times], 1)[0]
    way_2 = slope_2 * (len(centers_T2) - 1)
    if np.linalg.norm(way_2) < _LEAST_WAY:
        return None
    return max(digits.VECTORS, key=lambda name: float(np.dot(digits.VECTORS[name], way_2)))


def crops_around(gray_THW: np.ndarray, centers_T2: np.ndarray) -> Tensor:
    """Crops [T, 1, 20, 20] around the centers (around the middle where there is none), zeros beyond the frame."""
    half = CROP // 2
    _, height, width = gray_THW.shape
    padded = np.pad(gray_THW, ((0, 0), (half, half), (half, half)))
    middles_T2 = np.where(np.isnan(centers_T2), np.array([width / 2, height / 2]), centers_T2)
    corners_T2 = np.clip(middles_T2.round().astype(int), 0, [width, height])
    crops = [frame[y : y + CROP, x : x + CROP] for frame, (x, y) in zip(padded, corners_T2, strict=True)]
    return torch.from_numpy(np.stack(crops))[:, None]


class Judge:
    """Judges clips, uint8 RGB [T, H, W, C]."""

    def __init__(self, net: DigitNet) -> None:
        self._net = net.eval()

    def __call__(self, frames_THWC: np.ndarray) -> Verdict:
        gray_THW = ink(frames_THWC)
        centers_T2 = ink_centers(gray_THW)
        with torch.no_grad():
            log_probability_TD = self._net(crops_around(gray_THW, centers_T2)).log_softmax(dim=-1)
        frame_digits_T = log_probability_TD.argmax(dim=-1).numpy()
        frame_digits_T = np.where(np.isnan(centers_T2[:, 0]), -1, frame_digits_T)
        digit = int(log_probability_TD.mean(dim=0).argmax()) if (frame_digits_T >= 0).any() else -1
        return Verdict(digit, direction_of(centers_T2), frame_digits_T, centers_T2)


def _training_crops(settings: JudgeSettings) -> tuple[Tensor, Tensor]:
    """Crops [B, 1, 20, 20] of frames of rendered clips of the judge scans, and their digits [B]."""
    images, labels = digits.scans("judge")
    rng = np.random.default_rng(settings.seed)
    crops, targets = [], []
    for scan, label in zip(images, labels, strict=True):
        for _ in range(settings.clips_per_scan):
            motion = digits.sample_motion(rng)
            clip_THWC = digits.render_clip(scan, motion.directions, motion.speed, motion.start, motion.num_frames)
            chosen = rng.choice(len(clip_THWC), settings.frames_per_clip, replace=False)
            gray_THW = ink(clip_THWC[chosen])
            crops.append(crops_around(gray_THW, ink_centers(gray_THW)))
            targets += [int(label)] * settings.frames_per_clip
    return torch.cat(crops), torch.tensor(targets)


def _vary(crops_B1HW: Tensor, generator: torch.Generator) -> Tensor:
    """Small turns, sizes, shifts, contrasts and noise: few writers must stand for all."""
    B = len(crops_B1HW)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(B, generator=generator)

    angle, size = uniform(-0.2, 0.2), uniform(0.88, 1.14)
    shear = uniform(-0.15, 0.15)
    turn_B23 = torch.stack(
        [
            torch.stack([angle.cos() * size, (shear - angle.sin()) * size, uniform(-0.12, 0.12)], dim=1),
            torch.stack([angle.sin() * size, angle.cos() * size, uniform(-0.12, 0.12)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(turn_B23, list(crops_B1HW.shape), align_corners=False)
    varied = F.grid_sample(crops_B1HW, grid, align_corners=False)
    varied = varied * uniform(0.75, 1.1)[:, None, None, None]
    noise = torch.randn(varied.shape, generator=generator) * uniform(0, 0.06)[:, None, None, None]
    return (varied + noise).clamp(0, 1)


def train_judge(settings: JudgeSettings | None = None) -> Judge:
    """A judge trained from nothing; equal settings give equal judges on one machine."""
    settings = settings or JudgeSettings()
    crops_N1HW, targets_N = _training_crops(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net = DigitNet().train()
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.15
        )
        for _ in progress(range(settings.steps), settings.steps, "training the judge"):
            chosen = torch.randint(len(crops_N1HW), (settings.batch_size,), generator=generator)
            logits = net(_vary(crops_N1HW[chosen], generator))
            loss = F.cross_entropy(logits, targets_N[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return Judge(net)


def _fingerprint(settings: JudgeSettings) -> str:
    """sha256 of what makes a judge: settings, scans, this code and the renderer's.

    Not torch's version, which changes only how weights round: a judge that was trained on one machine serves on others.
    """
    described = [repr(settings), json.dumps(digits.scan_ids("judge"))]
    for module in (inspect.getmodule(DigitNet), digits):
        assert module is not None
        described.append(inspect.getsource(module))
    return hashlib.sha256("\n".join(described).encode()).hexdigest()


def load_or_train_judge(cache: Path | None, settings: JudgeSettings | None = None) -> Judge:
    """The judge of these settings, from the folder `cache` if it is there, else trained (and kept there)."""
    settings = settings or JudgeSettings()
    if cache is None:
        return train_judge(settings)
    path = cache / f"judge-{_fingerprint(settings)[:16]}.safetensors"
    if path.is_file():
        net = DigitNet()
        try:
            net.load_state_dict(load_file(path))
            return Judge(net)
        except (SafetensorError, RuntimeError) as error:
            _logger.warning("%s is damaged (%s); training the judge again", path, error)
    judge = train_judge(settings)
    with atomic_file(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in judge._net.state_dict().items()}))
    return judge
