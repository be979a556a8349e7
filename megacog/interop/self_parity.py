"""After an import: do the imported weights compute on our fast path what the file's compute step by step?

Random text and codes on a small grid, all layers. Both sides stream: weights are read layer by layer, so a model
of any size needs the memory of one layer and of the embedding tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megacog.checkpoint.export import Export, load_tensors
from megacog.config.schema import ModelConfig, Stage
from megacog.errors import CheckpointError
from megacog.interop.parity import Difference, difference
from megacog.interop.plain import Inputs, Weight, plain_logits
from megacog.model.transformer import CogVideo

SIDE = 4
"""Cells on a side of the small grid, at most."""
TEXT = 8
"""Text tokens, at most."""
TOLERANCE = 1e-4


def small_config(model: ModelConfig, stage: Stage) -> ModelConfig:
    """The model on a small grid: every weight, but few positions. Windows become half the grid."""
    grid = (min(SIDE, model.grid[0]), min(SIDE, model.grid[1]))
    changes: dict[str, Any] = {
        "grid": grid, "text_length": min(TEXT, model.text_length), "base_positions": model.base_position_rows,
        "plus_positions": model.plus_position_rows, "embedding_dropout": 0.0, "mlp_dropout": 0.0,
    }  # fmt: skip
    if stage != "base" and getattr(model.attention, stage).window is not None:
        half = (max(1, grid[0] // 2), max(1, grid[1] // 2))
        space = getattr(model.attention, stage).model_copy(update={"window": half})
        changes["attention"] = model.attention.model_copy(update={stage: space})
    return model.model_copy(update=changes)


@torch.no_grad()
def self_parity(export: Export, stage: Stage, weight: Weight) -> Difference:
    """Difference of the logits of all positions, ours from the plain ones, in fp32.

    Args:
        export: Whose weights run on our path.
        stage: Which model.
        weight: The source's weights, by the original's keys.

    Raises:
        CheckpointError: It is above `TOLERANCE`.
    """
    model = small_config(export.model, stage)
    inputs = Inputs.random(model, 1 if stage == "base" else model.num_frames, (model.text_length // 2, 0))
    theirs = plain_logits(lambda key: weight(key).float(), model, stage, inputs)
    ours = _streamed(model, stage, export.tensor).logits(
        inputs.text_BL - model.image_vocab_size, inputs.valid_BL, inputs.frames_BTP, stage
    )
    found = difference(f"logits of {stage}", ours, theirs)
    if not theirs.isfinite().all():
        raise CheckpointError(
            f"the {stage} weights of the source compute logits that are not finite: some of them are NaN or far too "
            "large. Copy the files again; the export was not written"
        )
    if not found.relative <= TOLERANCE:
        raise CheckpointError(
            f"the imported {stage} weights compute other logits than the source's, step by step: relative difference "
            f"{found.relative:.2e} > {TOLERANCE:.0e}. The export was not written; this is a bug or a failing disk"
        )
    return found


def _streamed(config: ModelConfig, stage: Stage, read: Callable[[str], Tensor]) -> CogVideo:
    """A model whose layers and vocabulary tables hold weights only while they run; fp32."""
    with torch.device("meta"):
        model = CogVideo(config, () if stage == "base" else (stage,)).eval()
    plus = model.plus_of(stage)
    groups: list[tuple[nn.Module, list[nn.Module]]] = [
        (model.code_embedding, [model.code_embedding]), (model.text_embedding, [model.text_embedding])
    ]  # fmt: skip
    for index, layer in enumerate(model.layers):
        groups.append((layer, [layer] if plus is None else [layer, plus.layers[index]]))
    for trigger, modules in groups:
        _stream(model, trigger, modules, read)
    resident = [model.position_embedding, model.final_layernorm]
    _load(model, resident if plus is None else [*resident, plus.position_embedding], read)
    return model


def _stream(model: CogVideo, trigger: nn.Module, modules: list[nn.Module], read: Callable[[str], Tensor]) -> None:
    def before(*_: object) -> None:
        _load(model, modules, read)

    def after(*_: object) -> None:
        for module in modules:
            module.to("meta")

    trigger.register_forward_pre_hook(before)
    trigger.register_forward_hook(after)


def _load(model: CogVideo, modules: list[nn.Module], read: Callable[[str], Tensor]) -> None:
    for module in modules:
        module.to_empty(device="cpu")
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    load_tensors(model, read, [name for name, parameter in model.named_parameters() if id(parameter) in inside])
