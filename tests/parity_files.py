"""Parity files of the original's format, made by the plain step-by-step model: any stage, window, size and padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sat_files import STAGES, original_weights
from torch import Tensor

from megacog.config.schema import ModelConfig, PlusStage
from megacog.interop.plain import Inputs, plain_logits, plain_loss
from megacog.runtime.tensor_files import save_tensors

STRIDE = 7


def parity_model(window: int = -1, stage: PlusStage = "sequential", **changes: Any) -> ModelConfig:
    """Two layers, width 24, 4 heads on an 8 x 8 grid; window -1 = full attention."""
    space = {"kind": "shifted_window", "window": (window, window)} if window > 0 else {"kind": "full"}
    settings: dict[str, Any] = dict(
        num_layers=2, hidden_size=24, num_heads=4, grid=(8, 8), text_length=10, image_vocab_size=30,
        text_vocab_size=14, boi_id=12, base_positions=600, plus_positions=330, attention={stage: space},
    )  # fmt: skip
    return ModelConfig.model_validate(settings | changes)


def parity_inputs(model: ModelConfig, padding: tuple[int, ...], seed: int = 5) -> Inputs:
    """Random text and codes, one sample for each number of padding tokens on its left."""
    generator = torch.Generator().manual_seed(seed)
    codes, vocabulary = model.image_vocab_size, model.image_vocab_size + model.text_vocab_size
    text_BL = torch.randint(codes, vocabulary - 2, (len(padding), model.text_length), generator=generator)
    valid_BL = torch.arange(model.text_length) >= torch.tensor(padding)[:, None]
    text_BL[~valid_BL] = vocabulary - 1
    return Inputs(
        text_BL, valid_BL, torch.randint(0, codes, (len(padding), model.num_frames, model.cells), generator=generator)
    )


def write_parity_file(
    path: Path,
    model: ModelConfig,
    stage: PlusStage,
    padding: tuple[int, ...] = (0, 4),
    *,
    weights: dict[str, Tensor] | None = None,
    with_weights: bool = True,
) -> Path:
    """Compute logits, loss and four gradients with the plain model and write them as a parity file."""
    weights = original_weights(model, stage, dtype=torch.float32, std=0.1) if weights is None else weights
    last = model.num_layers - 1
    plus = "mixins.attention_plus"
    trained = {
        key: weights[key].requires_grad_()
        for key in (f"{plus}.attn_distribution.0", f"{plus}.dense.{last}.weight", f"{plus}.query_key_value.0.weight",
                    f"{plus}.query_key_value.{last}.bias")
    }  # fmt: skip
    inputs = parity_inputs(model, padding)
    logits_BSV = plain_logits(weights.__getitem__, model, stage, inputs)
    loss = plain_loss(logits_BSV, model, stage, inputs)
    gradients = torch.autograd.grad(loss, list(trained.values()))
    assert model.boi_id is not None
    boi, vocabulary = model.image_vocab_size + model.boi_id, model.image_vocab_size + model.text_vocab_size
    space = getattr(model.attention, stage)
    metadata = {
        "stage": STAGES[stage], "window": space.window[0] if space.window else -1, "layers": model.num_layers,
        "hidden": model.hidden_size, "heads": model.num_heads, "vocab": vocabulary,
        "num_image_tokens": model.image_vocab_size, "boi": boi, "pad": vocabulary - 1, "frame_side": model.grid[0],
        "frames": model.num_frames, "text_len": model.text_length, "layernorm_eps": model.layernorm_eps,
        "logits_stride": STRIDE,
    }  # fmt: skip
    tensors = {
        "in.text": inputs.text_BL, "in.text_mask": inputs.valid_BL.float(), "in.frames": inputs.frames_BTP,
        "in.tokens": inputs.tokens(boi), "in.labels": inputs.labels(boi),
        "in.position_ids": inputs.positions(model.text_positions), "out.logits": logits_BSV[:, ::STRIDE],
        "out.image_loss": loss[None],
    }  # fmt: skip
    tensors |= {f"grad.{key}": gradient for key, gradient in zip(trained, gradients, strict=True)}
    if with_weights:
        tensors |= {f"model.{key}": tensor for key, tensor in weights.items()}
    save_tensors(tensors, path, {key: str(value) for key, value in metadata.items()})
    return path
