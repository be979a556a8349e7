"""Sharing samples among ranks changes neither losses nor gradients, however long the sequence is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked_ranks import run_forked_sequence
from small_model import batch, build_model, model_config
from torch import Tensor

from megacog.config.schema import Checkpointing, ModelConfig, Stage
from megacog.model.layout import stage_layout
from megacog.parallel.sequence import ALONE, SequenceParallel

STAGES: list[Stage] = ["base", "sequential", "interpolation"]


def loss_and_gradients(
    config: ModelConfig, stage: Stage, sequence: SequenceParallel, kept: Checkpointing = "none", samples: int = 2
) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """Loss, loss of each predicted frame and gradients of one step with everything that a step can be given."""
    model = build_model(config, () if stage == "base" else (stage,), sequence=sequence)
    model.activation_checkpointing = kept
    model.trainable(stage)
    frames = stage_layout(config, stage).grid.frames
    text, valid, codes = batch(config, frames, samples)
    context = codes.clone()
    context[:, 0] = (context[:, 0] + 1) % config.image_vocab_size
    weights = [float(frame + 1) for frame in range(frames)]
    torch.manual_seed(7)  # of dropout
    output = model(text, valid, codes, stage, context_BTP=context, frame_weights=weights)
    output.loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.item(), output.frame_loss_Q.numpy(), gradients


def assert_equal(ranks: list[Any], whole: Any) -> None:
    """The means over ranks, as engines take them, are what one rank gets."""
    loss, frame_loss, gradients = whole
    assert np.mean([rank[0] for rank in ranks]) == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(np.mean([rank[1] for rank in ranks], axis=0), frame_loss, rtol=1e-6)
    assert len({rank[0] for rank in ranks}) == len(ranks), "every rank has its own rows"
    for name, expected in gradients.items():
        found = np.mean([rank[2].get(name, 0 * expected) for rank in ranks], axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=name)
    assert all(rank[2].keys() <= gradients.keys() for rank in ranks)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_losses_and_gradients_of_shared_samples_are_those_of_one_rank(size: int, tmp_path: Path) -> None:
    config = model_config()
    ranks = run_forked_sequence(
        lambda sequence: {stage: loss_and_gradients(config, stage, sequence) for stage in STAGES}, size, tmp_path
    )
    for stage in STAGES:
        assert_equal([rank[stage] for rank in ranks], loss_and_gradients(config, stage, ALONE))


@pytest.mark.distributed
@pytest.mark.parametrize("kept", ["none", "selective", "full"])
def test_what_dropout_drops_does_not_depend_on_the_number_of_ranks(kept: Checkpointing, tmp_path: Path) -> None:
    config = model_config(embedding_dropout=0.2, mlp_dropout=0.3)

    def train(sequence: SequenceParallel) -> Any:
        return loss_and_gradients(config, "base", sequence, kept)

    whole = train(ALONE)
    assert whole[0] != pytest.approx(loss_and_gradients(model_config(), "base", ALONE)[0], rel=1e-3)
    assert_equal(run_forked_sequence(train, 2, tmp_path), whole)


@pytest.mark.distributed
def test_attention_sees_all_rows_in_raster_order_and_its_own_heads(tmp_path: Path) -> None:
    frames, cells, heads, queried = 3, 8, 4, 2
    whole = torch.arange(2 * frames * cells * heads * 5.0).view(2, frames * cells, heads, 5)

    def worker(sequence: SequenceParallel) -> list[np.ndarray]:
        seen: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen.extend([q, k, v])
            return 2 * q

        rows = sequence.own_rows(whole, cells)
        # The last frames may ask alone.
        last = rows[:, -queried * cells // sequence.size :]
        out = sequence.over_all_rows(attend, cells)(last, 10 * rows, 100 * rows)
        return [part.numpy() for part in (*seen, out)]

    for rank, (q, k, v, out) in enumerate(run_forked_sequence(worker, 4, tmp_path)):
        head = whole[:, :, rank : rank + 1]
        assert torch.equal(torch.from_numpy(q), head[:, -queried * cells :])
        assert torch.equal(torch.from_numpy(k), 10 * head) and torch.equal(torch.from_numpy(v), 100 * head)
        mine = whole.unflatten(1, (frames, cells))[:, -queried:, 2 * rank : 2 * rank + 2].flatten(1, 2)
        assert torch.equal(torch.from_numpy(out), 2 * mine)


@pytest.mark.distributed
def test_a_long_sequence_of_16_frames_of_32_by_32_cells_trains_as_on_one_rank(tmp_path: Path) -> None:
    config = model_config(
        num_layers=1, hidden_size=8, num_heads=2, num_frames=16, grid=(32, 32),
        attention={"sequential": {"kind": "local3d", "window": (9, 9), "frames": 2}},
    )  # fmt: skip

    def train(sequence: SequenceParallel) -> Any:
        return loss_and_gradients(config, "sequential", sequence, samples=1)

    whole = train(ALONE)  # its masks are inherited by the forked ranks
    assert whole[1].shape == (15,)
    assert_equal(run_forked_sequence(train, 2, tmp_path), whole)


def test_a_model_that_holds_a_part_of_the_sequence_gives_no_logits() -> None:
    model = build_model(plus=(), sequence=SequenceParallel(0, 2))
    with pytest.raises(ValueError, match="whole sequences"):
        model.logits(*batch(model_config(), 1), "base")
