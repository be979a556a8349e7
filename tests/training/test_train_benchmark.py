"""`launch/benchmark.py train` on a CPU, and how it judges a GPU's figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from measured_steps import MEASURED, TINY

from megacog.errors import MegacogError
from megacog.training import benchmark
from megacog.training.benchmark import Row, choose_cases, goals, line
from megacog.training.measure import Case, Measured, case_config
from megacog.training.synthetic import batches, random_base, random_batch, random_engine


def test_every_case_runs_on_a_cpu_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.json"
    assert benchmark.main(["--seconds", "0.01", "--micro-batch", "2", "--json", str(out), *TINY]) == 0
    printed = capsys.readouterr().out
    assert "resident memory of the process" in printed and printed.count("not run") == len(goals([], 1.0))
    found = json.loads(out.read_text())
    assert {row["case"] for row in found["rows"]} >= {
        "sequential, micro batch 2", "interpolation, micro batch 2", "sequential, micro batch 6, selective"
    }  # fmt: skip
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["steps"] >= 3 and row["peak_bytes"] > 2**20
        assert sum(row["shares"].values()) == pytest.approx(1.0)
        assert 2**10 < row["planned_bytes"] < row["peak_bytes"]  # of tensors alone
        assert row["shares"]["gemm"] > 0 and row["shares"]["head"] > 0 and row["shares"]["optimizer"] > 0
        assert (row["hardware_tflops"] > row["model_tflops"]) == ("selective" in row["case"])


def test_a_case_that_fails_says_why_and_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "plan_peak", lambda *arguments: 2.0**30)
    def out_of_memory(config: object, case: Case, *more: object) -> Measured:
        if case.policy == "selective":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return replace(MEASURED, case=case)

    monkeypatch.setattr(benchmark, "measure", out_of_memory)
    assert benchmark.main(["--micro-batch", "2", *TINY]) == 1
    printed = capsys.readouterr().out
    assert "failed (planned 1.00 GiB): OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n" in printed
    assert "interpolation, micro batch 2  " in printed
    with pytest.raises(MegacogError, match="'nothing' is part of no case: sequential"):
        choose_cases(8, "nothing")


def test_goals_are_judged_by_what_was_measured() -> None:
    rows = [
        Row(MEASURED.case, MEASURED, planned_bytes=105 * 2**30, planned_seconds=0.8),
        Row(Case("sequential", 24, "selective"), None, "OutOfMemoryError"),
        Row(Case("sequential", 8, fp8=True), replace(MEASURED, tokens_per_second=17_000.0)),
    ]
    verdicts = {str(goal)[:64].strip(): str(goal).split("  ")[-1] for goal in goals(rows, matmul=770.0)}
    assert verdicts == {
        "sequential, micro batch 8: model TFLOP/s / matmul": "MISSED",  # 480 of 770
        "interpolation, micro batch 8: model TFLOP/s / matmul": "not run",
        "sequential, micro batch 8: GiB": "reached",
        "sequential, micro batch 24, selective: GiB": "MISSED",
        "planned memory off the measured, worst case": "reached",
        "predicted step time off the measured, worst case": "MISSED",  # 0.8 s for 1 s
        "head and loss: share of device time": "reached",
        "fp8 base / bf16: tokens/s": "MISSED",  # 1.06
        "tokens/s / the original's 470 per GPU": "reached",  # 34
    }
    faster = [Row(MEASURED.case, replace(MEASURED, seconds=0.9), planned_bytes=90 * 2**30, planned_seconds=1.0)]
    share, *_, memory, seconds, _, _, _ = map(str, goals(faster, 770.0))
    assert memory.endswith("MISSED") and seconds.endswith("reached")
    assert share.endswith("goal >= 0.63  reached, then >= 0.75  MISSED")
    assert "480" in line(rows[0], 770.0) and "0.623" in line(rows[0], 770.0) and " 0.800 " in line(rows[0], 770.0)


def test_steps_are_predicted_for_devices_that_the_planner_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = case_config(benchmark.CPU_CONFIG, Case("sequential", 2), ("train.precision=bf16", *TINY))
    card = SimpleNamespace(total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    predicted = {}
    for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "Some GPU"):
        monkeypatch.setattr(benchmark, "device_name", lambda name=name: name)
        predicted[name] = benchmark.predict_seconds(config, torch.device("cuda"))
    assert predicted["Some GPU"] is None and benchmark.predict_seconds(config, torch.device("cpu")) is None
    assert predicted["NVIDIA H200"] and predicted["NVIDIA A100-SXM4-80GB"]
    assert 0 < predicted["NVIDIA H200"] < predicted["NVIDIA A100-SXM4-80GB"]
    row = Row(MEASURED.case, MEASURED, planned_seconds=predicted["NVIDIA H200"])
    assert benchmark.as_json(row)["planned_seconds"] == predicted["NVIDIA H200"]


def test_random_weights_are_the_same_for_the_same_name_and_start_the_set_from_the_base() -> None:
    config = case_config(benchmark.CPU_CONFIG, Case("sequential", 2), TINY)
    base = random_base(config, torch.device("cpu"))
    name = "layers.0.attention.qkv.weight"
    assert torch.equal(base.tensor(name), base.tensor(name))
    assert base.tensor(name).std() == pytest.approx(config.model.init.weight_std, rel=0.1)
    assert not base.tensor("layers.0.attention.qkv.bias").any()
    assert (base.tensor("final_layernorm.weight") == 1).all()
    assert base.tensor_bytes([name]) == {name: 96 * 32 * 4}
    model = random_engine(config, torch.device("cpu")).model
    assert torch.equal(model.get_parameter(name), base.tensor(name))
    assert torch.equal(model.get_parameter("plus.sequential.layers.0.qkv.weight"), base.tensor(name))
    trained = {parameter.requires_grad for n, parameter in model.named_parameters() if n.startswith("plus.")}
    assert trained == {True} and not model.get_parameter(name).requires_grad


def test_random_batches_come_around_and_can_start_anywhere() -> None:
    config = case_config(benchmark.CPU_CONFIG, Case("sequential", 2), TINY)
    stream = batches(config.model, "sequential", 2, distinct=3)
    first = [next(stream) for _ in range(5)]
    assert torch.equal(first[0].frames_BTP, first[3].frames_BTP)
    assert not torch.equal(first[0].frames_BTP, first[1].frames_BTP)
    later = next(batches(config.model, "sequential", 2, distinct=3, start=4))
    assert torch.equal(later.frames_BTP, first[1].frames_BTP) and later.sample_ids == first[1].sample_ids
    batch = random_batch(config.model, "base", 2, seed=0)
    assert batch.frames_BTP.shape == (2, 1, 6) and batch.text_valid_BL.all() and len(batch) == 2
