"""Planned against measured memory, and the rules of engines that are not run here."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from run_ranks import ROOT, python_environment

from megacog.config.schema import Checkpointing, Stage
from megacog.parallel.groups import ProcessGroups
from megacog.planning.memory import Elements, State, engine_state
from megacog.planning.plan import plan_peak
from megacog.planning.trace import Pass
from megacog.training.memory_check import ACCEPTED, measure_peak, small_run

T, F = 1_000_000, 3_000_000
ELEMENTS = Elements(trained=T, frozen=F, largest=10_000, weight_bytes=2, frozen_bytes=2 * F)


@pytest.mark.parametrize(
    ("policy", "stage"),
    [("none", "sequential"), ("selective", "sequential"), ("full", "sequential"), ("none", "base"),
     ("selective", "interpolation")],
)  # fmt: skip
def test_the_plan_is_within_5_percent_of_what_the_plain_engine_allocates(policy: Checkpointing, stage: Stage) -> None:
    config = small_run("torch-bf16", policy, 1, layers=6, stage=stage)
    planned = plan_peak(config, 1, policy, config.train.micro_batch_size, gpu=False)
    measured = measure_peak(config, ProcessGroups())
    assert planned == pytest.approx(measured, rel=ACCEPTED)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "layout"),
    [("zero1-bf16", ()), *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [("zero2-bf16", ("--sequence", "2")), ("zero1-bf16", ("--tensor", "2")), ("zero3-bf16", ())]
    )],
)  # fmt: skip
def test_the_plan_is_within_5_percent_of_what_deepspeed_allocates_on_two_ranks(
    engine: str, layout: tuple[str, ...]
) -> None:
    command = ["launch/plan.py", "check", "--ranks", "2", "--engines", engine, "--policies", "selective", *layout]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=python_environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert engine in done.stdout and "selective" in done.stdout


def state(engine: str, replicas: int, accumulation: int = 2, **train: object) -> State:
    config = small_run(engine, "none", replicas)
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    return engine_state(config, ELEMENTS, replicas, accumulation, gpu=True)


def test_zero_1_keeps_whole_gradients_in_fp32_on_every_rank() -> None:
    one, many = state("zero1-bf16", 1), state("zero1-bf16", 8)
    assert one.accumulated == many.accumulated == 4 * T
    assert many.masters == one.masters / 8 == 4 * T / 8
    assert many.in_reduction == 6 * T, "a copy in fp32 and one in bf16, whatever the bucket"


def test_zero_2_cuts_gradients_and_zero_3_weights() -> None:
    one, two, three = (state(f"zero{stage}-bf16", 8) for stage in (1, 2, 3))
    assert two.accumulated == one.accumulated / 8 and two.gradients == 0
    assert one.weights == two.weights == 8 * three.weights == 2 * (T + F)


def test_zero_3_holds_the_whole_model_while_it_is_built() -> None:
    three, two = state("zero3-bf16", 1000), state("zero2-bf16", 1000)
    assert three.building == 2 * (T + F) and two.building == 0
    alone = dataclasses.replace(State(), weights=three.weights, building=three.building)
    assert alone.peak(Pass(), 0).name == "while the model is built" and alone.peak(Pass(), 0).bytes == 2 * (T + F)


def test_sums_in_bf16_take_zero_1_to_another_optimizer() -> None:
    found = state("zero1-bf16", 8, gradient_dtype="bf16")
    assert found.accumulated == 0 and found.gradients == 2 * T


def test_gradients_lie_on_the_weights_only_while_micro_batches_are_accumulated() -> None:
    assert state("zero1-bf16", 8, accumulation=1).gradients == 0
    assert state("zero1-bf16", 8, accumulation=2).gradients == 2 * T


def test_the_peak_is_in_the_phase_that_needs_most() -> None:
    light, heavy = Pass(saved=10, peak_before=20, peak_after=25), Pass(saved=10, peak_before=2000, peak_after=1000)
    state = State(weights=100, in_reduction=300, in_step=50)
    assert (state.peak(light, 0).bytes, state.peak(light, 0).name) == (400, "while gradients are averaged")
    assert (state.peak(heavy, 0).bytes, state.peak(heavy, 0).name) == (2100, "in a forward pass")
