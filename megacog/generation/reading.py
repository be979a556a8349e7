"""The text stream of the model, run once per text: neither frames nor the place in a clip change it.

All blocks of an interpolation level, all samples of a prompt and all passes of a long clip share their texts.

Legend: B rows of a batch, U texts that are read together, L text length, N heads of this rank, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacog.config.schema import Stage
from megacog.model.attention import KeyValue
from megacog.model.transformer import CogVideo

_Key = tuple[Stage, bool, tuple[int, ...], tuple[bool, ...]]

KEPT = 16
"""Texts that stay in memory between batches: 64 tokens of the 9B model in bf16 take 75 MB. A clip has at most 9."""


@dataclass(frozen=True)
class Seen:
    """What one layer's frame rows see of texts: keys and values [B, L, N, D] of each channel."""

    base: KeyValue
    plus: KeyValue | None


class Reader:
    """Reads texts with one model and remembers the latest of them.

    The model's weights must not change meanwhile.
    """

    def __init__(self, model: CogVideo) -> None:
        self.model = model
        self._read: dict[_Key, list[Seen]] = {}
        """By layer, [1, L, N, D] each; the texts that were used last stand last."""

    def states(self, stage: Stage, text_BL: Tensor, valid_BL: Tensor, plus: bool) -> Iterator[Seen]:
        """What frame rows see of the texts, layer by layer.

        Args:
            stage: Whose attention-plus looks at the text.
            text_BL: int64 pieces, padded on the left, on any device; equal rows are read once.
            valid_BL: bool, False on padding.
            plus: False leaves the attention-plus channel out.
        """
        pairs = zip(text_BL.tolist(), valid_BL.tolist(), strict=True)
        keys_B: list[_Key] = [(stage, plus, tuple(text), tuple(valid)) for text, valid in pairs]
        wanted = dict.fromkeys(keys_B)
        missing = [key for key in wanted if key not in self._read]
        if missing:
            rows_U = [keys_B.index(key) for key in missing]
            text_UL, valid_UL = (rows_BL[rows_U].to(self.model.device) for rows_BL in (text_BL, valid_BL))
            self._read.update(zip(missing, self._run(stage, text_UL, valid_UL, plus), strict=True))
        for key in wanted:
            self._read[key] = self._read.pop(key)
        rows_B = [self._read[key] for key in keys_B]
        for key in list(self._read)[: -max(KEPT, len(wanted))]:
            del self._read[key]
        for states_B in zip(*rows_B, strict=True):
            plus_seen = [states.plus for states in states_B if states.plus is not None]
            yield Seen(_join([states.base for states in states_B]), _join(plus_seen) if plus_seen else None)

    @torch.no_grad()
    def _run(self, stage: Stage, text_UL: Tensor, valid_UL: Tensor, plus: bool) -> list[list[Seen]]:
        """The states of every text, by layer."""
        model = self.model
        attention_plus = model.plus_of(stage) if plus else None
        texts: list[list[Seen]] = [[] for _ in text_UL]
        rows_ULC = model.embed_text(text_UL, valid_UL)
        for index, layer in enumerate(model.layers):
            plus_layer = attention_plus.layers[index] if attention_plus is not None else None
            rows_ULC, states = layer.text_rows(rows_ULC, valid_UL)
            plus_seen = plus_layer.project_text(states.normed_BLC) if plus_layer is not None else None
            for row, text in enumerate(texts):
                text.append(Seen(_row(states.base, row), _row(plus_seen, row) if plus_seen is not None else None))
        return texts


def _row(states: KeyValue, row: int) -> KeyValue:
    """A copy of one text: a view would keep the queries and the other texts in memory, too."""
    k_ULND, v_ULND = states
    return k_ULND[row : row + 1].clone(), v_ULND[row : row + 1].clone()


def _join(states: Sequence[KeyValue]) -> KeyValue:
    k, v = zip(*states, strict=True)
    return torch.cat(k), torch.cat(v)
