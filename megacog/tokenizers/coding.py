"""What every frame tokenizer shares: groups of one size, checks of what goes in, the fingerprint.

Dimensions: B frames, H/W pixels, h/w code grid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from megacog.errors import DataError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class CodingModule(nn.Module):
    """A network that codes frames; implements `megacog.tokenizers.frames.FrameTokenizer`.

    Attributes:
        architecture: its name in tokenizer.json.
        group_pixels: pixels of one forward pass. Frames are coded in groups of one fixed size (the last one
            padded), because convolution libraries choose their algorithm, and with it the rounding, by the
            size of the batch.
        config: dataclass with everything that the shapes depend on; saved in tokenizer.json.
        codebook_size: codes are smaller than this.
        downsample: pixels per code along each axis.
    """

    architecture: ClassVar[str]
    group_pixels: ClassVar[int]
    config: DataclassInstance
    codebook_size: int
    downsample: int

    def codebook(self) -> Tensor:
        """Returns the vector of every code, float32 [codebook_size, D], on the module's device."""
        raise NotImplementedError

    def codes_of_frames(self, frames_BHWC: Tensor) -> Tensor:
        """Returns codes int64 [B, h, w] of one group of uint8 frames [B, H, W, 3] on the module's device."""
        raise NotImplementedError

    def frames_of_codes(self, codes_Bhw: Tensor) -> Tensor:
        """Returns uint8 frames [B, H, W, 3] of one group of int64 codes [B, h, w] on the module's device."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """sha256 over configuration and weights, as hex."""
        described = {"architecture": self.architecture, **asdict(self.config)}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for name, weight in sorted(self.state_dict().items()):
            tensor = weight.detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

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
        codes = self._in_groups(self.codes_of_frames, frames_BHWC, height * width)
        return torch.cat(codes) if codes else torch.empty((0, h, w), dtype=torch.int64, device=self._device)

    @torch.inference_mode()
    def decode(self, codes_Bhw: Tensor, on_frames: Callable[[int], None] | None = None) -> Tensor:
        """Returns uint8 frames [B, H, W, 3], on the tokenizer's device.

        Args:
            codes_Bhw: integers.
            on_frames: called with the number of frames just decoded.

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
        frames = self._in_groups(self.frames_of_codes, codes_Bhw, height * width, on_frames)
        empty = torch.empty((0, height, width, 3), dtype=torch.uint8, device=self._device)
        return torch.cat(frames) if frames else empty

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _in_groups(
        self, code: Callable[[Tensor], Tensor], batch: Tensor, pixels: int, done: Callable[[int], None] | None = None
    ) -> list[Tensor]:
        """Returns the results of groups of a fixed size that cover the batch, `pixels` per item."""
        group_size = max(1, self.group_pixels // pixels)
        results = []
        for group in batch.split(group_size) if len(batch) else ():
            missing = group_size - len(group)
            padded = torch.cat([group, group.new_zeros((missing, *group.shape[1:]))]) if missing else group
            results.append(code(padded.to(self._device))[: len(group)])
            if done is not None:
                done(len(group))
        return results
