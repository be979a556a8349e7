"""Random number generator states of one rank, as tensors."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def capture_rng() -> dict[str, Tensor]:
    """States of python's, numpy's, torch's and this device's generators: integer tensors by name."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    numpy_words = numpy_state["state"]
    states = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*numpy_words["key"].tolist(), numpy_words["pos"], numpy_state["has_gauss"]]),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: dict[str, Tensor]) -> None:
    """Put back what `capture_rng` took."""
    version, *words = states["python"].tolist()
    gauss = float(states["python_gauss"])
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))
    *key, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(key, dtype=np.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": float(states["numpy_gauss"]),
        }
    )
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
