"""The benchmark of generation runs on a CPU; its counts are checked, its goals are judged by what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_model import build_model, model_config

from megacog.generation.benchmark import Clip, Decoding, Report, Windows, goals, main, step_bytes
from megacog.model.transformer import CogVideo

SMALL = [
    "model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.grid=[4, 4]",
    "model.attention.interpolation={kind: shifted_window, window: [2, 2]}", "generation.levels=1",
]  # fmt: skip


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


def test_a_step_reads_weights_once_and_every_key_that_a_row_sees() -> None:
    model = build_model(model_config(grid=(2, 2), attention={"sequential": {"kind": "full"}}))
    kept = ("text_embedding", "position_embedding", "plus.interpolation")
    weights = sum(4 * p.numel() for name, p in model.named_parameters() if not any(part in name for part in kept))
    # Frame 2: text of 6, 8 codes of earlier frames and 1 to 4 of its own; in 2 layers of 32 fp32 channels, k and v.
    keys = 2 * ((6 + 2.5) + (6 + 8 + 2.5))
    assert step_bytes(model, "sequential", [2], 3) == weights + 3 * keys * 2 * 32 * 4
    assert step_bytes(model, "base", [0], 0) < weights
    with torch.device("meta"):
        half = CogVideo(model.config, ("sequential", "interpolation")).bfloat16()
    assert step_bytes(half, "sequential", [2], 3) * 2 == step_bytes(model, "sequential", [2], 3)


def test_goals_are_reached_or_missed_by_the_figures() -> None:
    one, many = Decoding(1, 1, 5.0, 200.0, 15.6, 0.7), Decoding(8, 16, 11.0, 1454.0, 30.9, 0.6)
    report = Report(
        "H200", 1, 4300.0, {"one clip": one, "8 guided clips": many}, Windows(590, 800, 3.0, 4.0, 1.0), [Clip(33, 70.0)]
    )
    verdicts = {line[:40].strip(): line.split()[-1] for line in goals(report)}
    assert verdicts == {
        "one clip: bytes/s over those of a copy": "reached",
        "8 guided clips: tokens/s": "MISSED",
        "an interpolation block, steps": "reached",
        "one guided clip of 33 frames, s": "MISSED",
    }
