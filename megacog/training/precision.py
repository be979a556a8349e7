"""What `train.precision` means."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""`train.precision` -> dtype of weights and compute."""
