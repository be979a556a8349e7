"""Imports need the memory of a few tensors, not of the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacog.config.schema import ModelConfig
from megacog.interop.benchmark import measure


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_importing_a_gigabyte_needs_a_fraction_of_it(tmp_path: Path, ranks: int) -> None:
    model = ModelConfig(
        num_layers=29, hidden_size=1024, num_heads=16, grid=(20, 20), image_vocab_size=4000, text_vocab_size=8000,
        boi_id=7990, base_positions=1024, plus_positions=2000,
    )  # fmt: skip
    found = measure(model, tmp_path, ranks)
    assert found.gigabytes > 1
    assert found.anonymous_gigabytes < 0.7, "torch alone takes 0.2 to 0.3"
    assert "relative difference" in found.report
