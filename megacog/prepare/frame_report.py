"""What a trained frame tokenizer is worth: PSNR, use of the codebook, a picture of reconstructions.

Dimensions: N frames, H/W pixels, h/w code grid.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacog.prepare.frame_pool import FramePool
from megacog.prepare.train_frames import psnr
from megacog.tokenizers.frames import ConvTokenizer

# Frames that are coded at once; bounds memory.
_BLOCK = 64
_PICTURE_COLUMNS = 8
_PICTURE_ROWS = 3
_GAP_PIXELS = 2
# Small frames are enlarged to about this many pixels in the picture.
_SHOWN_PIXELS = 96


def reconstruct(tokenizer: ConvTokenizer, frames_NHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (codes int64 [N, h, w], reconstructed uint8 [N, H, W, 3]) on the CPU."""
    codes, frames = [], []
    for block in frames_NHWC.split(_BLOCK):
        block_codes = tokenizer.encode(block)
        codes.append(block_codes.cpu())
        frames.append(tokenizer.decode(block_codes).cpu())
    return torch.cat(codes), torch.cat(frames)


def measure(tokenizer: ConvTokenizer, heldout: FramePool) -> dict[str, Any]:
    """Returns the quality on held-out frames as JSON values."""
    codes_Nhw, output_NHWC = reconstruct(tokenizer, heldout.frames_NHWC)
    errors_N = torch.stack(
        [
            ((real.float() - output.float()) / 255).square().mean()
            for real, output in zip(heldout.frames_NHWC, output_NHWC, strict=True)
        ]
    )
    counts_K = torch.bincount(codes_Nhw.flatten(), minlength=tokenizer.codebook_size).double()
    shares = counts_K[counts_K > 0] / counts_K.sum()
    changed = (codes_Nhw != codes_Nhw[heldout.neighbor_N]).double().mean().item()
    return {
        # Of the mean squared error over all frames, and averaged over frames.
        "psnr_db": round(psnr(errors_N.mean().item()), 2),
        "psnr_db_frame_mean": round(sum(psnr(error) for error in errors_N.tolist()) / len(errors_N), 2),
        "codebook_size": tokenizer.codebook_size,
        "perplexity": round(math.exp(-(shares * shares.log()).sum().item()), 2),
        "used_codes_share": round((counts_K > 0).double().mean().item(), 4),
        # Share of codes that differ from the adjacent frame's.
        "code_change_rate": round(changed, 4),
        "frames": len(heldout),
    }


def write_picture(path: Path, tokenizer: ConvTokenizer, heldout: FramePool) -> None:
    """Writes a PNG: rows of held-out frames of different clips, each above its reconstructions."""
    from PIL import Image

    firsts = heldout.first_frames
    wanted = min(_PICTURE_COLUMNS * _PICTURE_ROWS, len(firsts))
    chosen = torch.tensor([firsts[k * len(firsts) // wanted] for k in range(wanted)])
    real_NHWC = heldout.frames_NHWC[chosen]
    _, output_NHWC = reconstruct(tokenizer, real_NHWC)
    rows = []
    for real, output in zip(real_NHWC.split(_PICTURE_COLUMNS), output_NHWC.split(_PICTURE_COLUMNS), strict=True):
        rows += [_row(real), _row(output)]
    picture_HWC = torch.cat(rows)
    zoom = max(1, _SHOWN_PIXELS // max(real_NHWC.shape[1:3]))
    image = Image.fromarray(picture_HWC.numpy())
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)


def _row(frames_NHWC: Tensor) -> Tensor:
    """Returns one strip uint8 [H + gap, columns * (W + gap), 3] on a gray ground."""
    _, height, width, _ = frames_NHWC.shape
    strip = torch.full((height + _GAP_PIXELS, _PICTURE_COLUMNS * (width + _GAP_PIXELS), 3), 96, dtype=torch.uint8)
    for column, frame_HWC in enumerate(frames_NHWC):
        left = column * (width + _GAP_PIXELS)
        strip[:height, left : left + width] = frame_HWC
    return strip
