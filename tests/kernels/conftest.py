"""Without a GPU, Triton interprets the kernels; it looks at this variable when they are defined."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
