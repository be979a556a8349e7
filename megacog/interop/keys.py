"""Names of the original's weights and ours: one table, both ways.

The original (CogView2, CogVideo on SwissArmyTransformer) keeps a flat dict. A base is its `transformer.*`; a video
stage adds `mixins.*`: positions and attention-plus. Its word embedding table is our two tables, codes first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from megacog.config.schema import ModelConfig, Stage
from megacog.model.init import whole_shape
from megacog.model.transformer import CogVideo
from megacog.parallel.tensor import ShardSpec

WORDS = "transformer.word_embeddings.weight"
MIXINS = "mixins."
_PLUS_POSITIONS = "mixins.extra_position_embedding.position_embeddings.weight"
_LAYER_PARTS = {
    "attention.qkv": "attention.query_key_value",
    "attention.dense": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_PLUS_PARTS = {"qkv": "query_key_value", "dense": "dense"}
_BEFORE_0_1 = (
    (re.compile(r"^mixins\.0\."), "mixins.extra_position_embedding."),
    (re.compile(r"^mixins\.1\."), "mixins.attention_plus."),
    (re.compile(r"^word_embeddings\."), "transformer.word_embeddings."),
)
"""Names in files of SwissArmyTransformer before 0.1 -> the later ones."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the original."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    names: tuple[str, ...]
    """Our parameters: its rows, one after the other."""
    rows: tuple[int, ...]
    """Rows of each of them."""
    shard: ShardSpec | None
    """How model-parallel ranks cut it; None = each holds it whole."""

    def part(self, name: str) -> slice:
        """Rows of our parameter `name` in this tensor."""
        start = sum(self.rows[: self.names.index(name)])
        return slice(start, start + self.rows[self.names.index(name)])


def original_key(name: str) -> str:
    """Key of the original that holds our parameter `name`."""
    parts = name.split(".")
    if parts[0] in ("code_embedding", "text_embedding"):
        return WORDS
    if parts[0] == "position_embedding":
        return "transformer.position_embeddings.weight"
    if parts[0] == "layers":
        module = ".".join(parts[2:-1])
        return f"transformer.layers.{parts[1]}.{_LAYER_PARTS.get(module, module)}.{parts[-1]}"
    if parts[0] != "plus":
        return f"transformer.{name}"
    if parts[2] == "position_embedding":
        return _PLUS_POSITIONS
    if parts[4] == "gate":
        return f"mixins.attention_plus.attn_distribution.{parts[3]}"
    return f"mixins.attention_plus.{_PLUS_PARTS[parts[4]]}.{parts[3]}.{parts[5]}"


def original_entries(model: ModelConfig, stage: Stage) -> dict[str, Entry]:
    """Every tensor of the original's model of a stage (base = CogView2's), by key."""
    with torch.device("meta"):
        parameters = dict(CogVideo(model, () if stage == "base" else (stage,)).named_parameters())
    names: dict[str, list[str]] = {}
    for name in parameters:
        names.setdefault(original_key(name), []).append(name)
    entries = {}
    for key, ours in names.items():
        shapes = [tuple(whole_shape(parameters[name], 1)) for name in ours]
        rows = tuple(shape[0] for shape in shapes)
        shard = getattr(parameters[ours[0]], "shard", None)
        if len(ours) > 1:
            shard = ShardSpec(dim=0, length=sum(rows))
        entries[key] = Entry(key, (sum(rows), *shapes[0][1:]), tuple(ours), rows, shard)
    return entries


def modern_key(key: str) -> str:
    """The key under its name since SwissArmyTransformer 0.1."""
    for pattern, replacement in _BEFORE_0_1:
        key = pattern.sub(replacement, key)
    return key


def name_problems(found: Iterable[str], known: Iterable[str]) -> list[str]:
    """A line for each key that is unknown or missing, with the nearest name on the other side."""
    there, wanted = set(found), set(known)
    unknown, missing = sorted(there - wanted), sorted(wanted - there)
    lines = [f"unknown key {key}{_nearest(key, wanted)}" for key in unknown]
    return lines + [f"missing key {key}{_nearest(key, unknown)}" for key in missing]


def shape_problems(shapes: Mapping[str, Sequence[int]], entries: Mapping[str, Entry]) -> list[str]:
    """A line for each whole tensor whose shape is not the one that the model has."""
    return [
        f"{key} is {list(shape)}, expected {list(entries[key].shape)}"
        for key, shape in shapes.items()
        if tuple(shape) != entries[key].shape
    ]


def _nearest(key: str, names: Iterable[str]) -> str:
    # Keys differ in one word or number, so a candidate of another layer would only mislead.
    layers = re.findall(r"\d+", key)
    candidates = [name for name in names if re.findall(r"\d+", name) == layers] or list(names)
    near = get_close_matches(key, candidates, 1)
    return f" (nearest: {near[0]})" if near else ""
