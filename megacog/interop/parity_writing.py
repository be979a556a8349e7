"""Parity files made here, of any size: what the plain step-by-step model computes from random inputs.

The weights are random and stored in the file, or an export's and not stored. `convert.py parity` compares with them.

Legend: B batch, L text length, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megacog.checkpoint.export import Export
from megacog.config.schema import ModelConfig, PlusStage
from megacog.errors import ConfigError
from megacog.interop.exporting import whole_tensor
from megacog.interop.keys import original_entries
from megacog.interop.parity import GRADIENT, LOGITS, LOSS, MODEL
from megacog.interop.plain import Inputs, Weight, plain_logits, plain_loss
from megacog.interop.settings import STAGE_NUMBERS
from megacog.runtime.files import atomic_file, require_space
from megacog.runtime.tensor_files import save_tensors

STRIDE = 7
"""Every seventh position's logits are stored, as in the original's files."""
_SEED = 20220529


def write_parity_file(
    out: Path,
    model: ModelConfig,
    stage: PlusStage,
    padding: Sequence[int],
    weights: dict[str, Tensor] | Export | None = None,
) -> None:
    """Compute logits, loss and four gradients in fp32 on the CPU, sample by sample, and write them.

    Args:
        out: The file.
        model: Shape and attention.
        stage: Which one.
        padding: For each sample, how many of its text tokens are padding.
        weights: By the original's keys, stored in the file; or an export, whose are not; None = random ones.

    Raises:
        ConfigError: The format cannot say what the model is, or a sample has more padding than text.
        EnvError: There is too little disk space.
    """
    metadata = _metadata(model, stage)
    if not padding or not all(0 <= count <= model.text_length for count in padding):
        raise ConfigError(f"padding {list(padding)} must be numbers from 0 to model.text_length {model.text_length}")
    if weights is None:
        weights = random_weights(model, stage)
    stored = {} if isinstance(weights, Export) else {MODEL + key: tensor for key, tensor in weights.items()}
    inputs = Inputs.random(model, model.num_frames, padding)
    boi = int(metadata["boi"])
    tensors = {
        "in.text": inputs.text_BL, "in.text_mask": inputs.valid_BL.float(), "in.frames": inputs.frames_BTP,
        "in.tokens": inputs.tokens(boi), "in.labels": inputs.labels(boi),
        "in.position_ids": inputs.positions(model.text_positions),
    }  # fmt: skip
    rows = -(-tensors["in.tokens"].shape[1] // STRIDE)
    logits_bytes = 4 * len(padding) * rows * int(metadata["vocab"])
    require_space(out, logits_bytes + sum(tensor.nbytes for tensor in stored.values()))
    weight = _export_weight(weights, stage) if isinstance(weights, Export) else weights.__getitem__
    tensors |= _results(weight, model, stage, inputs)
    with atomic_file(out) as file:
        save_tensors(tensors | stored, Path(file.name), metadata)


def random_weights(model: ModelConfig, stage: PlusStage) -> dict[str, Tensor]:
    """Weights of the original's keys, all of them N(0, 1 / (4 x width)), norms around 1; fp32."""
    generator = torch.Generator().manual_seed(_SEED)
    std = 0.5 / math.sqrt(model.hidden_size)
    weights = {}
    for key, entry in original_entries(model, stage).items():
        weights[key] = torch.empty(entry.shape).normal_(0, std, generator=generator)
        if key.endswith("layernorm.weight"):
            weights[key] += 1
    return weights


def _metadata(model: ModelConfig, stage: PlusStage) -> dict[str, str]:
    space = getattr(model.attention, stage)
    square = model.grid[0] == model.grid[1] and (space.window is None or space.window[0] == space.window[1])
    if space.kind not in ("full", "shifted_window") or not square or model.boi_id is None:
        raise ConfigError(
            "a parity file describes square frames, full attention or square shifted windows, and a known boi_id; the "
            f"model has grid {list(model.grid)}, attention.{stage} {space.kind} {space.window}, boi_id {model.boi_id}"
        )
    codes, vocabulary = model.image_vocab_size, model.image_vocab_size + model.text_vocab_size
    numbers = {
        "stage": next(number for number, name in STAGE_NUMBERS.items() if name == stage),
        "window": space.window[0] if space.window else -1, "layers": model.num_layers, "hidden": model.hidden_size,
        "heads": model.num_heads, "vocab": vocabulary, "num_image_tokens": codes, "boi": codes + model.boi_id,
        "pad": vocabulary - 1, "frame_side": model.grid[0], "frames": model.num_frames,
        "text_len": model.text_length, "layernorm_eps": model.layernorm_eps, "logits_stride": STRIDE,
    }  # fmt: skip
    return {key: str(number) for key, number in numbers.items()}


def _results(weight: Weight, model: ModelConfig, stage: PlusStage, inputs: Inputs) -> dict[str, Tensor]:
    plus, last = "mixins.attention_plus", model.num_layers - 1
    keys = (
        f"{plus}.attn_distribution.0", f"{plus}.dense.{last}.weight", f"{plus}.query_key_value.0.weight",
        f"{plus}.query_key_value.{last}.bias",
    )  # fmt: skip
    trained = {key: weight(key).clone().requires_grad_() for key in keys}
    logits, losses = [], []
    batch = len(inputs.text_BL)
    for b in range(batch):
        sample = Inputs(inputs.text_BL[b : b + 1], inputs.valid_BL[b : b + 1], inputs.frames_BTP[b : b + 1])
        logits_BSV = plain_logits(lambda key: trained[key] if key in trained else weight(key), model, stage, sample)
        logits.append(logits_BSV[:, ::STRIDE].detach().clone())
        loss = plain_loss(logits_BSV, model, stage, sample) / batch  # every sample has as many predicted codes
        del logits_BSV
        loss.backward()
        losses.append(loss.detach())
    found = {GRADIENT + key: tensor.grad for key, tensor in trained.items() if tensor.grad is not None}
    return found | {LOGITS: torch.cat(logits), LOSS: torch.stack(losses).sum()[None]}


def _export_weight(export: Export, stage: PlusStage) -> Weight:
    entries = original_entries(export.model, stage)

    def weight(key: str) -> Tensor:
        return whole_tensor(export, entries[key]).float()

    return weight
