"""`model_config.json`, which SwissArmyTransformer writes beside its weights, to and from our model section.

It says nothing of the vocabulary's parts: 150010 rows are icetk's, others need a configuration of ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megacog.config.schema import ModelConfig, PlusStage, SpaceConfig, Stage
from megacog.errors import CheckpointError

FILE = "model_config.json"
STAGE_NUMBERS: dict[int, PlusStage] = {1: "sequential", 2: "interpolation"}
"""`cogvideo_stage` of a file -> our stage."""
IMAGE_TOKENS = 20_000
"""Rows of icetk's vocabulary that are image codes; they come first."""
START_OF_IMAGE = 150_000
"""icetk's id of `<start_of_image>`."""
_COMPARED = (
    "num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_sequence_length", "window_size",
    "additional_seqlen", "layernorm_order", "inner_hidden_size", "hidden_size_per_attention_head",
)  # fmt: skip
_OURS = "megacog"
"""Key of files that megacog writes: the model section, whole."""


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's model_config.json; None without one.

    Raises:
        CheckpointError: It is no JSON object.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again, or give --config instead") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object; copy it again, or give --config instead")
    return found


def stage_of(settings: Mapping[str, Any], path: Path) -> PlusStage | None:
    """Which attention-plus a file holds if it says so.

    Raises:
        CheckpointError: It says something that megacog does not know.
    """
    number = settings.get("cogvideo_stage")
    if number is not None and number not in STAGE_NUMBERS:
        raise CheckpointError(f"{path / FILE}: cogvideo_stage is {number!r}, expected 1 or 2")
    return None if number is None else STAGE_NUMBERS[number]


def model_of(settings: Mapping[str, Any], stage: Stage, path: Path) -> ModelConfig:
    """The model that a model_config.json describes.

    Args:
        settings: Its content.
        stage: Whose weights lie beside it: `window_size` is this stage's.
        path: The folder, for messages.

    Raises:
        CheckpointError: A key is missing, or says something that megacog cannot run.
    """
    if _OURS in settings:
        return _validated(settings[_OURS], path)
    if settings.get("layernorm_order", "sandwich") != "sandwich":
        raise CheckpointError(f"{path / FILE}: layernorm_order is {settings['layernorm_order']!r}, expected 'sandwich'")
    hidden, heads = _number(settings, "hidden_size", path), _number(settings, "num_attention_heads", path)
    per_head = settings.get("hidden_size_per_attention_head")
    if per_head is not None and per_head * heads != hidden:
        raise CheckpointError(f"{path / FILE}: {heads} heads of {per_head} channels are not hidden_size {hidden}")
    vocabulary = _number(settings, "vocab_size", path)
    if vocabulary <= START_OF_IMAGE:
        raise CheckpointError(
            f"{path / FILE}: vocab_size {vocabulary} is not icetk's (150010 rows, {IMAGE_TOKENS} of them image codes), "
            "so its parts are not known; give --config with image_vocab_size, text_vocab_size and boi_id"
        )
    model: dict[str, Any] = {
        "num_layers": _number(settings, "num_layers", path), "hidden_size": hidden, "num_heads": heads,
        "ffn_size": settings.get("inner_hidden_size"), "image_vocab_size": IMAGE_TOKENS,
        "text_vocab_size": vocabulary - IMAGE_TOKENS, "boi_id": START_OF_IMAGE - IMAGE_TOKENS,
        "base_positions": _number(settings, "max_sequence_length", path),
        "plus_positions": settings.get("additional_seqlen"),
    }  # fmt: skip
    model |= _layout(settings.get("layout", "64,464,2064"), path)
    if stage != "base":
        model["attention"] = {stage: _space(settings.get("window_size", -1))}
    return _validated(model, path)


def settings_of(model: ModelConfig, stage: Stage, ranks: int) -> dict[str, Any]:
    """The model_config.json of a stage's model; what the original's lacks is under a key of ours."""
    text, cells = model.text_length, model.cells
    settings: dict[str, Any] = {
        "model_class": "BaseModel" if stage == "base" else "CogVideoModel",
        "num_layers": model.num_layers, "hidden_size": model.hidden_size, "num_attention_heads": model.num_heads,
        "vocab_size": model.image_vocab_size + model.text_vocab_size, "layernorm_order": "sandwich",
        "inner_hidden_size": model.ffn, "hidden_size_per_attention_head": model.head_dim,
        "max_sequence_length": model.base_position_rows, "model_parallel_size": ranks,
        "hidden_dropout": model.mlp_dropout, "attention_dropout": 0.0, _OURS: model.model_dump(mode="json"),
    }  # fmt: skip
    if stage != "base":
        space: SpaceConfig = getattr(model.attention, stage)
        settings |= {
            "layout": f"{text},{text + cells},{text + model.num_frames * cells}",
            "window_size": space.window[0] if space.window else -1,
            "additional_seqlen": model.plus_position_rows,
            "cogvideo_stage": next(number for number, name in STAGE_NUMBERS.items() if name == stage),
        }
    return settings


def disagreements(settings: Mapping[str, Any], model: ModelConfig, stage: Stage) -> list[str]:
    """A line for each thing that a model_config.json says otherwise than `model`."""
    expected = settings_of(model, stage, 1)
    keys = [key for key in _COMPARED if settings.get(key) is not None and key in expected]
    found = [f"{key} is {settings[key]!r}, not {expected[key]!r}" for key in keys if settings[key] != expected[key]]
    if settings.get("layout") is not None and "layout" in expected:
        # The text may be longer; frames may not.
        theirs, ours = _ends(settings["layout"]), _ends(expected["layout"])
        if [end - theirs[0] for end in theirs] != [end - ours[0] for end in ours]:
            found.append(f"layout is {settings['layout']!r}, not {expected['layout']!r}")
    return found


def window_space(window: int) -> SpaceConfig:
    """The attention-plus space of the original's `window_size`; -1 = full attention."""
    return SpaceConfig(kind="shifted_window", window=(window, window)) if window > 0 else SpaceConfig()


def _space(window: Any) -> dict[str, Any]:
    return window_space(int(window)).model_dump()


def _layout(layout: Any, path: Path) -> dict[str, Any]:
    """Text length, grid and frames of `text, text + one frame, text + all frames`."""
    try:
        text, one, all_ = _ends(layout)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / FILE}: layout is {layout!r}, expected numbers like 64,464,2064") from error
    cells = one - text
    side = math.isqrt(max(cells, 0))
    if side < 1 or side * side != cells or (all_ - text) % cells:
        raise CheckpointError(f"{path / FILE}: layout {layout!r} is not a text and whole square frames; give --config")
    return {"text_length": text, "grid": (side, side), "num_frames": (all_ - text) // cells}


def _ends(layout: Any) -> list[int]:
    return [int(part) for part in (layout.split(",") if isinstance(layout, str) else layout)]


def _number(settings: Mapping[str, Any], key: str, path: Path) -> int:
    value = settings.get(key)
    if not isinstance(value, int):
        raise CheckpointError(f"{path / FILE}: {key} is {value!r}, expected a whole number; give --config")
    return value


def _validated(model: Any, path: Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate(model)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, line['loc']))}: {line['msg']}" for line in error.errors())
        raise CheckpointError(f"{path / FILE} describes no model of ours: {problems}") from error
