"""One number for a set of tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class TensorDigest:
    """sha256 over names, dtypes, shapes and bytes of CPU tensors, in the order in which they are added."""

    def __init__(self) -> None:
        self._total = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        self._total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        self._total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        return self._total.hexdigest()
