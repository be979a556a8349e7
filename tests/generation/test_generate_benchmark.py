"""The benchmark of generation runs on a CPU; its counts are checked, its goals are judged by what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_model import build_model, model_config

from megacog.config.load import load_config
from megacog.generation import benchmark, hierarchy
from megacog.generation.benchmark import Bench, Clip, Decoding, Report, Windows, goals, main, random_model, step_bytes
from megacog.model.transformer import CogVideo
from megacog.parallel.fp8 import held_weight

SMALL = [
    "model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.grid=[4, 4]",
    "model.attention.interpolation={kind: shifted_window, window: [2, 2]}", "generation.levels=1",
]  # fmt: skip


DIGITS = Path(__file__).resolve().parents[2] / "configs/digits.yaml"


def test_it_measures_decoding_windows_and_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--device", "cpu", "--json", str(tmp_path / "figures.json"), *SMALL])
    report = json.loads((tmp_path / "figures.json").read_text())
    assert [case["rows"] for case in report["decoding"].values()] == [1, 16]
    assert all(case["ms_per_step"] > 0 and case["tokens_per_s"] > 0 for case in report["decoding"].values())
    assert (report["windows"]["steps"], report["windows"]["steps_alone"]) == (22, 32)
    assert report["windows"]["equal_codes"] == 1.0
    assert [clip["frames"] for clip in report["clips"]] == [5, 9]
    printed = capsys.readouterr().out
    assert "22 steps" in printed and "goal" not in printed  # goals are those of a GPU


def test_any_configuration_can_be_measured_with_its_base_in_e4m3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(DIGITS.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    saved: list[dict[str, object]] = []
    monkeypatch.setattr(benchmark, "write_json", lambda path, report: saved.append(report))
    small = ["model.grid=[2, 2]", "generation.levels=0", "generation.base_precision=fp8"]
    main(["--config", "mine.yaml", "--device", "cpu", "--json", "figures.json", *SMALL[:3], *small])
    assert list(saved[-1]["decoding"]) == ["one clip, fp8 base", "8 guided clips, fp8 base"]
    assert [clip["fp8"] for clip in saved[-1]["clips"]] == [True]
    assert len(saved) == 4 and len(saved[0]["decoding"]) == 1  # as they come
    assert "one guided clip, fp8 base" in capsys.readouterr().out


def test_clusters_are_not_made_again_for_every_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> None:
        raise AssertionError("k-means")

    monkeypatch.setattr(hierarchy, "clusters_for", slow)
    small = [*SMALL[:3], "model.grid=[2, 2]", "generation.sampler=clusters"]
    bench = Bench(load_config(DIGITS, small), torch.device("cpu"), tmp_path)
    assert bench.clusters is not None and bench.clip(0).frames == 5


def test_steps_that_the_host_launches_are_timed_without_the_ones_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(load_config(DIGITS, [*SMALL[:3], "model.grid=[4, 4]"]), torch.device("cpu"), tmp_path)
    generate, steps = benchmark.generate_frames, []

    def counted(*arguments: object, **named: object) -> object:
        steps.append(len(named["steps"].steps))
        assert named["cuda_graphs"] is False
        return generate(*arguments, **named)

    monkeypatch.setattr(benchmark, "generate_frames", counted)
    clock = iter([0.0, 5.0, 10.0, 13.0])
    monkeypatch.setattr(benchmark, "now", lambda device: next(clock))
    found = bench.launching(copy_rate=1e9, count=4)
    assert steps == [12, 8] and found.ms_per_step == 500.0
    cells = range(2 * 16 + 8, 2 * 16 + 12)
    assert found.gigabytes * 1e9 == step_bytes(bench.model, "sequential", cells, 1)


def test_a_step_reads_weights_once_and_every_key_that_a_row_sees() -> None:
    model = build_model(model_config(grid=(2, 2), attention={"sequential": {"kind": "full"}}))
    kept = ("text_embedding", "position_embedding", "plus.interpolation")
    weights = sum(4 * p.numel() for name, p in model.named_parameters() if not any(part in name for part in kept))
    # Frame 2: text of 6, 8 codes of earlier frames and 1 to 4 of its own; in 2 layers of 32 fp32 channels, k and v.
    keys = 2 * ((6 + 2.5) + (6 + 8 + 2.5))
    frame_2 = range(8, 12)
    assert step_bytes(model, "sequential", frame_2, 3) == weights + 3 * keys * 2 * 32 * 4
    assert step_bytes(model, "base", range(4), 0) < weights
    with torch.device("meta"):
        half = CogVideo(model.config, ("sequential", "interpolation")).bfloat16()
    assert step_bytes(half, "sequential", frame_2, 3) * 2 == step_bytes(model, "sequential", frame_2, 3)


def test_a_random_base_in_e4m3_is_as_large_as_it_reads() -> None:
    config, cpu = model_config(grid=(2, 2)), torch.device("cpu")
    model = random_model(config, cpu, "fp8")
    held = [layer for layer in model.modules() if getattr(layer, "weight_scale", None) is not None]
    assert len(held) == 4 * config.num_layers
    for layer in held:
        weight = held_weight(layer.weight, layer.weight_scale)
        assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
    with torch.device("meta"):
        half = CogVideo(config, ("sequential", "interpolation")).bfloat16()
    # A byte less for every element, 4 more for every scale.
    smaller = sum(layer.weight.numel() - 4 * len(layer.weight) for layer in held)
    assert step_bytes(half, "base", [0], 1) - step_bytes(model, "base", [0], 1) == smaller > 0


def test_goals_are_reached_or_missed_by_the_figures() -> None:
    one, many = Decoding(1, 1, 5.0, 200.0, 15.6, 0.7), Decoding(8, 16, 11.0, 1454.0, 30.9, 0.6)
    windows, clips = Windows(590, 800, 3.0, 4.0, 1.0), [Clip(33, 20.0), Clip(33, 11.0, fp8=True)]
    report = Report("H200", 1, 4300.0, {"one clip": one, "8 guided clips": many}, windows, clips)
    verdicts = {goal.name: str(goal).split(" goal ")[1] for goal in goals(report)}
    assert verdicts == {
        "one clip: bytes/s over those of a copy": ">= 0.65 reached, then >= 0.8 MISSED",
        "8 guided clips: tokens/s": ">= 1600 MISSED",
        "an interpolation block, steps": "<= 590 reached",
        "one guided clip of 5 frames, s": "<= 12 not run",
        "one guided clip of 33 frames, s": "<= 60 reached, then <= 20 reached",
        "one guided clip of 33 frames, fp8 base, s": "<= 12 reached",
    }
