"""Cutting a model over ranks changes neither losses nor gradients nor logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import run_forked
from small_model import batch, build_model, model_config
from torch import Tensor

from megacog.config.schema import Checkpointing, Stage
from megacog.model.layout import stage_layout
from megacog.parallel.loss import parallel_cross_entropy
from megacog.parallel.tensor import ShardSpec, TensorParallel

CONFIG = model_config()
STAGES: list[Stage] = ["base", "sequential", "interpolation"]
POLICIES: dict[Stage, Checkpointing] = {"base": "selective", "sequential": "selective", "interpolation": "full"}


def losses_and_gradients(parallel: TensorParallel) -> dict[str, Any]:
    """Loss and local gradients of every stage, as numpy (queues move tensors by file handles)."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        model = build_model(CONFIG, parallel=parallel)
        model.activation_checkpointing = POLICIES[stage]
        model.trainable(stage)
        inputs = batch(CONFIG, stage_layout(CONFIG, stage).grid.frames)
        output = model(*inputs, stage)
        output.loss.backward()
        gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
        found[stage] = (output.loss.item(), gradients)
        with torch.no_grad():
            found[f"{stage} logits"] = model.logits(*inputs, stage).numpy()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_losses_gradients_and_logits_equal_those_of_one_rank(size: int, tmp_path: Path) -> None:
    whole = losses_and_gradients(TensorParallel())
    shards = {name: getattr(p, "shard", None) for name, p in build_model(CONFIG).named_parameters()}
    ranks = run_forked(losses_and_gradients, size, tmp_path)
    for stage in STAGES:
        loss, gradients = whole[stage]
        for rank in ranks:
            assert rank[stage][0] == pytest.approx(loss, rel=1e-6)
            torch.testing.assert_close(rank[f"{stage} logits"], whole[f"{stage} logits"], rtol=1e-4, atol=1e-4)
        for name, expected in gradients.items():
            parts = [torch.from_numpy(rank[stage][1][name]) for rank in ranks]
            shard = shards[name]
            for part in [shard.gather(parts)] if shard else parts:
                torch.testing.assert_close(part, torch.from_numpy(expected), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_cross_entropy_of_a_cut_head_equals_the_whole_one_with_large_logits_and_empty_ranks(
    size: int, tmp_path: Path
) -> None:
    hidden, weight = torch.randn(6, 5) * 10, torch.randn(3, 5) * 10
    targets, grad = torch.tensor([0, 1, 2, 0, 1, 2]), torch.linspace(-1, 2, 6)
    shard = ShardSpec(dim=0, length=3)

    def worker(parallel: TensorParallel) -> Any:
        first = shard.local_length(parallel.size) * parallel.rank
        rows = weight[first : first + shard.local_length(parallel.size)].clone().requires_grad_()
        leaves = (hidden.clone().requires_grad_(), rows)
        loss = parallel_cross_entropy(*leaves, targets, first, parallel)
        return tuple(part.detach().numpy() for part in (loss, *torch.autograd.grad(loss, leaves, grad)))

    whole = (hidden.double().requires_grad_(), weight.double().requires_grad_())
    loss = torch.nn.functional.cross_entropy(whole[0] @ whole[1].T, targets, reduction="none")
    assert loss.max() > 100
    expected = [part.float() for part in (loss, *torch.autograd.grad(loss, whole, grad.double()))]
    results = run_forked(worker, size, tmp_path)
    assert size < 4 or results[3][2].shape == (0, 5)
    for result in results:
        torch.testing.assert_close(torch.from_numpy(result[0]), expected[0])
        torch.testing.assert_close(torch.from_numpy(result[1]), expected[1], rtol=1e-4, atol=1e-5)
    rows = torch.cat([torch.from_numpy(result[2]) for result in results])
    torch.testing.assert_close(rows, expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "blocks", "size"), [(12, 1, 4), (12, 3, 2), (17, 1, 4), (11, 1, 2)])
@pytest.mark.parametrize("dim", [0, 1])
def test_gathered_slices_are_the_whole(length: int, blocks: int, size: int, dim: int) -> None:
    whole: Tensor = torch.randn((length, 5) if dim == 0 else (5, length))
    shard = ShardSpec(dim, length, blocks)
    parts = [shard.slice(whole, rank, size) for rank in range(size)]
    assert {part.shape[dim] for part in parts} == {shard.local_length(size)}
    assert torch.equal(shard.gather(parts), whole)


def test_a_head_count_that_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        build_model(model_config(), parallel=TensorParallel(0, 3))
