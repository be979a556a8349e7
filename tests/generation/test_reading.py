"""Every text is read once, whoever asks for it, and what is remembered is what the model reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import batch, build_model
from torch import Tensor

from megacog.generation import reading
from megacog.generation.reading import Reader
from megacog.model.transformer import CogVideo


def counted(model: CogVideo, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts go through the model at once, call by call."""
    sizes: list[int] = []
    embed = model.embed_text

    def counting(text_BL: Tensor, valid_BL: Tensor) -> Tensor:
        sizes.append(len(text_BL))
        return embed(text_BL, valid_BL)

    monkeypatch.setattr(model, "embed_text", counting)
    return sizes


def tensors(states: Any) -> list[Tensor]:
    return [part for layer in states for channel in (layer.base, layer.plus) if channel for part in channel]


def test_equal_texts_are_read_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model().eval()
    text, valid, _ = batch(model.config, 5, size=3)
    rows = [0, 1, 0, 2, 1]
    with torch.no_grad():
        each = [tensors(Reader(model).states("sequential", text[[row]], valid[[row]], True)) for row in rows]
    sizes = counted(model, monkeypatch)
    reader = Reader(model)
    together = tensors(reader.states("sequential", text[rows], valid[rows], True))
    assert sizes == [3]
    for index, part in enumerate(together):
        torch.testing.assert_close(part, torch.cat([one[index] for one in each]))
    again = tensors(reader.states("sequential", text[rows], valid[rows], True))
    assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))
    assert sizes == [3]
    # Another stage has another attention-plus, without it there is nothing to see of it, and padding hides pieces.
    other = tensors(reader.states("interpolation", text[:1], valid[:1], True))
    assert sizes == [3, 1] and not torch.equal(other[2], together[2][:1])
    assert len(tensors(reader.states("sequential", text[:1], valid[:1], False))) == len(together) // 2
    list(reader.states("sequential", text[:1], ~valid[:1], True))
    assert sizes == [3, 1, 1, 1]


def test_only_the_latest_texts_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "KEPT", 2)
    model = build_model().eval()
    text, valid, _ = batch(model.config, 5, size=3)
    reader = Reader(model)
    sizes = counted(model, monkeypatch)
    for row in (0, 1, 0, 2, 0, 1):
        list(reader.states("base", text[[row]], valid[[row]], True))
    assert sizes == [1, 1, 1, 1]  # 0, 1, 2, and 1 again, which 2 has put out
    list(reader.states("base", text, valid, True))
    assert sizes[4:] == [1] and len(list(reader.states("base", text, valid, True))) == 2
