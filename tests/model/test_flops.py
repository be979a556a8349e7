"""The counted work against torch's own counter and against the dense masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import batch, model_config
from torch.utils.flop_counter import FlopCounterMode

from megacog.config.schema import Checkpointing, ModelConfig, Stage
from megacog.model.flops import tokens_per_sample, training_work, visible_pairs
from megacog.model.init import initialize_base, initialize_plus
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid, dense_mask

RELEASE = ModelConfig(
    num_layers=48, hidden_size=3072, num_heads=48, grid=(20, 20), text_length=64, text_positions=512,
    image_vocab_size=20000, text_vocab_size=130010, boi_id=130000,
)  # fmt: skip


@st.composite
def masks(draw: st.DrawFn) -> tuple[MaskSpec, VideoGrid]:
    frames, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    level = tuple(draw(st.lists(st.integers(0, 2), min_size=frames, max_size=frames)))
    is_open = tuple(draw(st.lists(st.booleans(), min_size=frames, max_size=frames)))
    window = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    shift = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    reach = draw(st.none() | st.integers(1, 3))
    spaces = [
        Space(), Space("frame"), Space("local3d", window, reach), Space("shifted_window", window, shift=shift)
    ]  # fmt: skip
    return MaskSpec(Order(level, is_open), draw(st.sampled_from(spaces))), VideoGrid(frames, height, width)


@settings(max_examples=300)
@given(masks())
def test_visible_pairs_are_the_elements_of_the_dense_mask(case: tuple[MaskSpec, VideoGrid]) -> None:
    mask, grid = case
    by_frame = dense_mask(mask, grid).reshape(grid.frames, grid.cells, -1).sum(axis=(1, 2))
    assert visible_pairs(mask, grid) == tuple(by_frame)


def test_large_grids_are_counted_without_their_masks() -> None:
    """32 x 60 x 60 tokens have a mask of 13 GB; here against a sum over axes written out."""
    grid = VideoGrid(32, 60, 60)
    side = [min(59, u + 8) - max(0, u - 8) + 1 for u in range(60)]
    near = sum(side) ** 2
    seen = visible_pairs(MaskSpec(Order.sequential(32), Space("local3d", (17, 17))), grid)
    assert seen == tuple(frame * near + (near + 3600) // 2 for frame in range(32))
    assert sum(seen) == 460_194_048


def test_the_sequential_stage_of_the_9b_model_by_hand() -> None:
    """70.97 TFLOP per sample; whole layers, all gradients and five attention products backward would be 72.8.

    The difference: 0.93 for gradients of text rows, 0.77 for the scores that a fused backward pass computes again
    (no work of the model), 0.35 for rows that the last layer leaves out and attention-plus queries of the text.
    """
    C, F, L, Q, N = 3072, 2000, 64, 1600, 48
    square = 2 * C * C
    whole = {"frozen": (N - 1) * 12 * square * (2 * F + L), "trained": (N - 1) * (12 * square * F + 4 * square * L)}
    last = {
        "frozen": 2 * (2 * square * F + 10 * square * Q) + 2 * square * L,
        "trained": 3 * square * (2 * F + 2 * Q) + 4 * square * L,
    }  # fmt: skip
    own, full = 400 * 401 // 2, [frame * 400 * 400 + 400 * 401 // 2 for frame in range(5)]

    def attention(frames: range, text: int) -> int:
        rows = 400 * len(frames)
        return 4 * C * (text + 3 * own * len(frames) + 3 * sum(full[f] for f in frames) + (2 + 3) * rows * L)

    work = training_work(RELEASE, "sequential")
    assert work.frozen == whole["frozen"] + last["frozen"]
    assert work.trained == whole["trained"] + last["trained"]
    assert work.attention == (N - 1) * attention(range(5), L * L) + attention(range(1, 5), 0)
    assert work.head == 2 * 2 * C * 20000 * Q
    assert work.model == pytest.approx(70.965e12, rel=1e-4)
    assert tokens_per_sample(RELEASE, "sequential") == 2064

    scores_again = work.attention / 6  # one of the backward pass's five products
    text_gradients = N * 16 * square * L
    left_out = 10 * 2 * square * 400 + 10 * square * L + 3 * 2 * square * 400 + N * 2 * square * L
    assert scores_again / 1e12 == pytest.approx(0.77, abs=0.01)
    assert text_gradients / 1e12 == pytest.approx(0.93, abs=0.01)
    assert (work.model + scores_again + text_gradients + left_out) / 1e12 == pytest.approx(72.8, rel=0.003)


def test_windows_and_known_frames_make_interpolation_cheaper() -> None:
    sequential, interpolation = (training_work(RELEASE, stage) for stage in ("sequential", "interpolation"))
    assert interpolation.attention < 0.6 * sequential.attention
    assert interpolation.head == sequential.head // 2
    assert np.isclose(interpolation.frozen, sequential.frozen, rtol=0.01)


def test_the_base_stage_trains_everything() -> None:
    work = training_work(RELEASE, "base")
    assert work.frozen == 0
    rows = 464 * 48 * 12 - 64 * 10  # the last layer needs keys and values of its text only
    assert work.trained == 3 * 2 * 3072**2 * rows


def test_recomputation_is_work_of_the_hardware_only() -> None:
    none, selective, full = (training_work(RELEASE, "sequential", policy) for policy in ("none", "selective", "full"))
    assert none.recomputed == 0 and none.hardware == none.model == selective.model == full.model
    square = 2 * 3072**2
    by_layer = (3 + 3 + 4) * square * 2000 + 2 * square * 64
    last = (2 * 2000 + 5 * 1600) * square + (2 * 2000 + 1600) * square + 2 * square * 64
    assert selective.recomputed == 47 * by_layer + last
    forward = 31.4e12 - 0.2e12  # the whole forward pass, without its head
    assert full.recomputed == pytest.approx(forward, rel=0.03)
    base = training_work(RELEASE, "base", "full")
    assert base.recomputed == (base.trained + base.attention) // 3


def added_product(total: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    """Of addmm_, which torch counts only where it makes a new tensor."""
    return 2 * a[0] * a[1] * b[1]


def counted_linear(stage: Stage, policy: Checkpointing, config: ModelConfig, samples: int = 2) -> int:
    """What torch counts in the matrix products of a real forward and backward pass, without attention and head."""
    model = CogVideo(config, () if stage == "base" else (stage,), activation_checkpointing=policy)
    initialize_base(model, seed=1)
    if stage != "base":
        initialize_plus(model, stage, "copy", seed=1)
    model.trainable(stage)
    model.train()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product})
    with counter:
        model(*batch(config, stage_layout(config, stage).grid.frames, samples), stage).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    aten = torch.ops.aten
    return sum(counts.get(op, 0) for op in (aten.mm, aten.addmm, aten.addmm_, aten.bmm))


def attention_forward(config: ModelConfig, stage: Stage) -> int:
    """Of all frame rows that a loss needs, in both channels, from the dense masks."""
    layout, pairs = stage_layout(config, stage), 0
    for layer in range(config.num_layers):
        masks = [layout.base_mask]
        if stage != "base":
            masks.append(layout.plus_mask(getattr(config.attention, stage), layer))
        frames = list(layout.loss_frames if layer == config.num_layers - 1 else range(layout.grid.frames))
        for mask in masks:
            seen = dense_mask(mask, layout.grid).reshape(layout.grid.frames, -1)[frames].sum()
            pairs += int(seen) + len(frames) * config.cells * config.text_length
    return 4 * config.hidden_size * pairs


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("stage", ["base", "sequential", "interpolation"])
def test_linear_work_is_what_torch_counts_in_a_real_step(stage: Stage, policy: Checkpointing) -> None:
    config = model_config(num_layers=3, ffn_size=80)
    work = training_work(config, stage, policy)
    again = work.recomputed - (attention_forward(config, stage) if policy == "full" else 0)
    if policy == "full" and stage == "base":
        again -= 2 * 4 * 32 * 6 * 6  # the text's own attention in the two layers that need it
    assert counted_linear(stage, policy, config) == 2 * (work.frozen + work.trained + again)
