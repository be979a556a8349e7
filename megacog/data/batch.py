"""What a training step takes in: texts, codes, and how they were made.

Dimensions: B batch, L text length, T frames, P cells of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megacog.tokenizers.text import TextTokenizer


@dataclass(frozen=True)
class Batch:
    """One micro batch.

    Attributes:
        text_BL: int64, padded on the left.
        text_valid_BL: bool, false on padding.
        frames_BTP: int64 codes: targets, and inputs where context_BTP is None.
        context_BTP: int64 input codes when they differ from the targets (`train.context_corruption`).
        fps_B: float32 real frame rate of each sample; 0 for single frames.
        sample_ids: `clip id[first:end:stride]` of each sample.
    """

    text_BL: Tensor
    text_valid_BL: Tensor
    frames_BTP: Tensor
    context_BTP: Tensor | None
    fps_B: Tensor
    sample_ids: list[str]

    def __len__(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with its tensors on `device`."""
        context = self.context_BTP
        return Batch(
            self.text_BL.to(device, non_blocking=True),
            self.text_valid_BL.to(device, non_blocking=True),
            self.frames_BTP.to(device, non_blocking=True),
            None if context is None else context.to(device, non_blocking=True),
            self.fps_B.to(device, non_blocking=True),
            self.sample_ids,
        )


@dataclass(frozen=True)
class BatchArrays:
    """A micro batch as plain arrays: what loader processes send (no shared memory needed).

    Attributes:
        texts: token ids of each sample, unpadded.
        frames_BTP: codes of the stored type.
        context_BTP: the same with corrupted given frames, or None.
        fps: real frame rates.
        sample_ids: see `Batch`.
    """

    texts: list[list[int]]
    frames_BTP: NDArray[Any]
    context_BTP: NDArray[Any] | None
    fps: list[float]
    sample_ids: list[str]


def collate(arrays: BatchArrays, text: TextTokenizer, text_length: int) -> Batch:
    """Returns the batch of tensors.

    Args:
        arrays: of one micro batch.
        text: pads the texts.
        text_length: L.

    Raises:
        DataError: a text is longer than L; the message names it.
    """
    text_BL, text_valid_BL = text.pad(arrays.texts, text_length)
    context = arrays.context_BTP
    return Batch(
        text_BL,
        text_valid_BL,
        torch.from_numpy(arrays.frames_BTP.astype(np.int64)),
        None if context is None else torch.from_numpy(context.astype(np.int64)),
        torch.tensor(arrays.fps, dtype=torch.float32),
        arrays.sample_ids,
    )
