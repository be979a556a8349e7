"""What a layer keeps for its backward pass, byte for byte, and that nothing is computed which no loss needs."""

from __future__ import annotations

import gc

import pytest
import torch
from small_model import batch, model_config
from torch._subclasses.fake_tensor import FakeTensorMode
from tracked_memory import TrackedMemory

from megacog.config.schema import Checkpointing, Kernels, ModelConfig, PlusStage
from megacog.model.transformer import CogVideo

POLICIES: tuple[Checkpointing, ...] = ("none", "selective", "full")
RELEASE = dict(
    hidden_size=3072, num_heads=48, grid=(20, 20), text_length=64, text_positions=512, image_vocab_size=20000,
    text_vocab_size=130010, boi_id=130000,
)  # fmt: skip


def layer_bytes(config: ModelConfig, policy: Checkpointing, kernels: Kernels, samples: int) -> int:
    """Of a middle layer in bf16 in a video stage, from the shapes: docs/training.md has the list."""
    rows, text = samples * config.num_frames * config.cells, samples * config.text_length
    C, N, triton = config.hidden_size, config.num_heads, kernels == "triton"
    log_sums = 2 * 4 * rows * N if triton else 0
    wide = {"none": 18 + triton, "selective": 6, "full": 1}[policy]
    total = 2 * C * (wide * rows + 4 * text)  # text: its normed rows, and q|k|v of the base in one buffer
    if policy == "none":
        statistics = 8 * rows * (4 if triton else 2)
        gate = 0 if triton else 2 * 2 * C  # sigmoid of the logit, and one minus that
        total += 2 * C * 2 * text + statistics + gate  # text: k and v of attention-plus
    return total + (log_sums if policy != "full" else 0)


def kept_bytes(config: ModelConfig, stage: PlusStage, policy: Checkpointing, kernels: Kernels, samples: int) -> int:
    """Everything that lives between forward and backward pass, without parameters."""
    torch.set_default_dtype(torch.bfloat16)  # a model of fake tensors cannot be cast
    try:
        model = CogVideo(config, (stage,), activation_checkpointing=policy, kernels=kernels)
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.trainable(stage)
    text, valid, codes = batch(config, config.num_frames, samples)
    model(text, valid, codes, stage)  # tables are made and kept by a first call
    with TrackedMemory() as memory:
        loss = model(text, valid, codes, stage).loss
    gc.collect()
    assert loss.requires_grad
    return memory.live


@pytest.mark.parametrize(
    ("stage", "kernels"),
    [
        ("sequential", "reference"),
        ("interpolation", "reference"),
        pytest.param("interpolation", "triton", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_keeps_what_the_formula_says(stage: PlusStage, policy: Checkpointing, kernels: Kernels) -> None:
    def config(layers: int) -> ModelConfig:
        return model_config(num_layers=layers, num_heads=2, grid=(2, 4), attention={stage: {"kind": "full"}})

    two, three = (kept_bytes(config(layers), stage, policy, kernels, samples=2) for layers in (2, 3))
    assert three - two == layer_bytes(config(3), policy, kernels, samples=2)


@pytest.mark.parametrize(("policy", "gib"), [("none", 10.0), ("selective", 3.37), ("full", 0.62)])
def test_activations_of_a_sample_of_the_release(policy: Checkpointing, gib: float) -> None:
    config = model_config(num_layers=3, **RELEASE)
    per_layer = layer_bytes(config, policy, "reference", samples=1)
    assert 48 * per_layer / 2**30 == pytest.approx(gib, abs=0.005)
    with FakeTensorMode(allow_non_fake_inputs=True):
        kept = [
            kept_bytes(config.model_copy(update={"num_layers": layers}), "sequential", policy, "reference", samples=1)
            for layers in (2, 3)
        ]
    assert kept[1] - kept[0] == per_layer
