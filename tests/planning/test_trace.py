"""A pass on fake tensors: what it counts, and that depth and batch are extrapolated exactly."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megacog.config.schema import Checkpointing, Config
from megacog.model.transformer import CogVideo
from megacog.planning import trace
from megacog.planning.trace import Ledger, trace_pass
from megacog.training.memory_check import small_run
from megacog.training.pretrain import example_inputs


def run(policy: Checkpointing = "none", **size: int) -> Config:
    return small_run("torch-fp32", policy, 1, **size)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_depth_and_batch_are_extrapolated_exactly(policy: Checkpointing, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run(layers=6)
    quick = trace_pass(config, policy, 5, gpu=True)
    monkeypatch.setattr(trace, "_DEPTHS", (6, 6))
    monkeypatch.setattr(trace, "_BATCHES", (5, 6))
    trace._at_batch.cache_clear()
    whole = trace_pass(config, policy, 5, gpu=True)
    trace._at_batch.cache_clear()
    for field in dataclasses.fields(whole):
        if field.name != "peak_kept":  # of two lines over the batch, the higher one: see State.peak
            assert getattr(quick, field.name) == pytest.approx(getattr(whole, field.name), rel=1e-3), field.name


def test_matrix_products_are_those_that_torch_counts_in_a_real_pass() -> None:
    config = run(layers=2)
    model = CogVideo(config.model, ("sequential",))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.trainable("sequential")
    counter = FlopCounterMode(display=False)
    with counter:
        model(**example_inputs(config, torch.device("cpu"))).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    linear = sum(count for op, count in counts.items() if str(op) in ("aten.mm", "aten.addmm", "aten.bmm"))
    rows, C, V = 2 * 4 * 64, 128, 500
    head = 3 * 2 * rows * C * V  # logits, logits again, gradient of the hidden states: inside of one operator
    # The text's share of attention-plus's k|v gradients is added in place, which torch's counter passes over.
    text = 2 * (2 * 2 * config.model.text_length * C * 2 * C)
    traced = trace_pass(config, "none", 2, gpu=True)
    assert linear > 5 * head
    assert traced.gemm_flops == pytest.approx(linear + head + text, rel=1e-6)


def test_recomputation_saves_memory_and_costs_work() -> None:
    none, selective, full = (trace_pass(run(layers=4), policy, 4, gpu=True) for policy in ("none", "selective", "full"))
    assert none.saved > 2 * selective.saved > 4 * full.saved
    assert none.gemm_flops < selective.gemm_flops < full.gemm_flops
    assert none.attention_flops == selective.attention_flops < full.attention_flops, "attention's results are kept"
    assert none.attention_backward_flops == full.attention_backward_flops


@pytest.mark.parametrize(("shared", "kind"), [("tensor", "all_reduce"), ("sequence", "all_to_all_single")])
def test_collectives_are_those_of_a_pass(shared: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where they are called, for every policy, in a model as deep as it is; planned from shallower ones."""
    calls: list[int] = []
    real = getattr(torch.distributed, kind)

    def counted(tensor: torch.Tensor, *arguments: object, **options: object) -> object:
        calls.append(tensor.nbytes)
        return real(tensor, *arguments, **options)

    config = run(layers=5)
    parallel = config.parallel.model_copy(update={shared: 2})
    planned, counts = {}, {}
    policies: tuple[Checkpointing, ...] = ("none", "selective", "full")
    for policy in policies:
        planned[policy] = trace_pass(config.model_copy(update={"parallel": parallel}), policy, 2, gpu=True)
    monkeypatch.setattr(trace, "_DEPTHS", (5, 5))
    monkeypatch.setattr(torch.distributed, kind, counted)
    trace._at_batch.cache_clear()
    for policy in policies:
        calls.clear()
        trace_pass(config.model_copy(update={"parallel": parallel}), policy, 2, gpu=True)
        counts[policy] = (len(calls), sum(calls))
    trace._at_batch.cache_clear()
    name = "sum" if shared == "tensor" else "exchange"
    found = {policy: (getattr(one, f"{name}s"), getattr(one, f"{name}_bytes")) for policy, one in planned.items()}
    assert found == counts
    assert found["full"][0] > found["none"][0] > 0, "what is recomputed is sent again"


def test_attention_takes_seven_products_for_five_where_it_is_deterministic() -> None:
    config = run(layers=2)
    free = config.model_copy(update={"train": config.train.model_copy(update={"deterministic": False})})
    same, any_order = (trace_pass(each, "none", 2, gpu=True) for each in (config, free))
    assert same.attention_flops == any_order.attention_flops
    assert same.attention_backward_flops * 5 == pytest.approx(any_order.attention_backward_flops * 7)


def test_a_ledger_counts_what_lives_and_remembers_the_peak() -> None:
    given = torch.zeros(10)
    ledger = Ledger([given])
    with ledger:
        view = given[2:]
        one = view + 1
        two = one * 2
        del one
    assert ledger.live == two.nbytes
    assert ledger.peak == 2 * two.nbytes, "views and what was given cost nothing"
