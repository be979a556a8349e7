"""The original implementation's numbers, from the tensor file that it made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megacog.config.schema import ModelConfig
from megacog.model.transformer import CogVideo

FILE = Path(__file__).parents[1] / "parity" / "sequential_full.safetensors"
TOLERANCE = 1e-4
NAMES = {
    "input_layernorm": "input_layernorm", "third_layernorm": "third_layernorm",
    "post_attention_layernorm": "post_attention_layernorm", "fourth_layernorm": "fourth_layernorm",
    "attention.query_key_value": "attention.qkv", "attention.dense": "attention.dense",
    "mlp.dense_h_to_4h": "mlp.up", "mlp.dense_4h_to_h": "mlp.down",
}  # fmt: skip
CHANNEL = {"query_key_value": "qkv", "dense": "dense", "attn_distribution": "gate.logit"}


def our_name(original: str) -> str:
    """Parameter name of an original key (word embeddings, which are split, aside)."""
    parts = original.split(".")
    if original.startswith("mixins.extra_position_embedding"):
        return "plus.sequential.position_embedding.weight"
    if parts[0] == "mixins":
        return ".".join(["plus.sequential.layers", parts[3], CHANNEL[parts[2]], *parts[4:]])
    if parts[1] == "layers":
        return ".".join(["layers", parts[2], NAMES[".".join(parts[3:-1])], parts[-1]])
    return ".".join([parts[1].replace("position_embeddings", "position_embedding"), *parts[2:]])


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(FILE)


@pytest.fixture(scope="module")
def model(tensors: dict[str, Tensor]) -> CogVideo:
    with safe_open(FILE, framework="pt") as file:
        facts = file.metadata()
    codes, vocabulary = int(facts["num_image_tokens"]), int(facts["vocab"])
    config = ModelConfig(
        num_layers=int(facts["layers"]),
        hidden_size=int(facts["hidden"]),
        num_heads=int(facts["heads"]),
        grid=(int(facts["frame_side"]),) * 2,
        text_length=int(facts["text_len"]),
        image_vocab_size=codes,
        text_vocab_size=vocabulary - codes,
        boi_id=int(facts["boi"]) - codes,
        base_positions=tensors["model.transformer.position_embeddings.weight"].shape[0],
        layernorm_eps=float(facts["layernorm_eps"]),
    )
    model = CogVideo(config, ("sequential",))
    words = tensors["model.transformer.word_embeddings.weight"]
    state = {"code_embedding.weight": words[:codes], "text_embedding.weight": words[codes:]}
    for key, tensor in tensors.items():
        if key.startswith("model.") and "word_embeddings" not in key:
            state[our_name(key.removeprefix("model."))] = tensor
    model.load_state_dict(state)
    model.trainable("sequential")
    return model


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def text_inputs(model: CogVideo, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    text = tensors["in.text"] - model.config.image_vocab_size
    return text, tensors["in.text_mask"].bool(), tensors["in.frames"]


def test_logits_equal_the_original(model: CogVideo, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        logits = model.logits(*text_inputs(model, tensors), "sequential")[:, ::7]
    assert relative(logits, tensors["out.logits"]) <= TOLERANCE


def test_loss_and_gradients_equal_the_original(model: CogVideo, tensors: dict[str, Tensor]) -> None:
    model.zero_grad()
    output = model(*text_inputs(model, tensors), "sequential")
    output.loss.backward()
    assert relative(output.loss.detach()[None], tensors["out.image_loss"]) <= 1e-5
    parameters = dict(model.named_parameters())
    gradients = [key for key in tensors if key.startswith("grad.")]
    assert len(gradients) == 4
    for key in gradients:
        gradient = parameters[our_name(key.removeprefix("grad."))].grad
        assert gradient is not None
        assert relative(gradient, tensors[key]) <= TOLERANCE, key
