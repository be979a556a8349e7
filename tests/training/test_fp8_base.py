"""Runs whose frozen base is held in e4m3."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_inputs, settings, write_config

from megacog.checkpoint.export import load_model, open_export
from megacog.config.load import load_config
from megacog.errors import ConfigError
from megacog.generation import infer
from megacog.metrics.record import read_records
from megacog.training import pretrain


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def base(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 export of a short base run."""
    folder = tmp_path_factory.mktemp("base")
    values = settings(inputs, folder / "run", "base", engine="torch", steps=10, eval_every=0)
    assert run(folder, values) == 0
    return folder / "run/export"


def run(folder: Path, values: dict[str, Any], *overrides: str) -> int:
    return pretrain.main(["--config", str(write_config(folder / "config.yaml", values)), *overrides])


def video(inputs: Path, base: Path, run_dir: Path, **train: Any) -> dict[str, Any]:
    train = {"engine": "torch", "precision": "bf16", "base_precision": "fp8"} | train
    values = settings(inputs, run_dir, "sequential", **train)
    values["model"]["inherit"] = str(base)
    return values


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_records(run_dir / "metrics.jsonl") if line["kind"] == "train"]


def tensors(export: Path) -> dict[str, torch.Tensor]:
    opened = open_export(export, verify=True)
    return {name: opened.tensor(name) for name in opened.files}


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_run_trains_like_bf16_and_its_export_holds_the_base_as_it_was(
    inputs: Path, base: Path, tmp_path: Path, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert run(tmp_path, video(inputs, base, tmp_path / "fp8", engine=engine)) == 0
    assert any("float32 -> float8_e4m3fn  frozen" in line for line in caplog.text.splitlines())
    assert run(tmp_path, video(inputs, base, tmp_path / "bf16", engine=engine, base_precision=None)) == 0
    mine, theirs = losses(tmp_path / "fp8"), losses(tmp_path / "bf16")
    assert mine == pytest.approx(theirs, rel=5e-3) and mine != theirs and mine[-1] < mine[0]
    before, after = tensors(base), tensors(tmp_path / "fp8/export")
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_the_attention_plus_starts_from_the_base_as_it_is_stored(inputs: Path, base: Path, tmp_path: Path) -> None:
    values = video(inputs, base, tmp_path / "run", steps=1, learning_rate=1e-12, eval_every=0)
    assert run(tmp_path, values) == 0
    before, after = tensors(base), tensors(tmp_path / "run/export")
    for linear in ("qkv", "dense"):
        stored = before[f"layers.1.attention.{linear}.weight"].bfloat16()
        assert torch.equal(after[f"plus.sequential.layers.1.{linear}.weight"], stored)


def test_resuming_is_bitwise(inputs: Path, base: Path, tmp_path: Path) -> None:
    values = video(inputs, base, tmp_path / "whole")
    assert run(tmp_path, values) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-0000008")
    shutil.rmtree(tmp_path / "cut/export")
    assert run(tmp_path, values, f"train.run_dir={tmp_path / 'cut'}", "train.resume=must") == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    one, other = tensors(tmp_path / "whole/export"), tensors(tmp_path / "cut/export")
    assert all(torch.equal(one[name], other[name]) for name in one)
    before = tensors(base)  # the export above read it from the run's own copy
    assert all(torch.equal(before[name], other[name]) and before[name].dtype == other[name].dtype for name in before)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"train": {"stage": "base"}}, "stage base trains it"),
        ({"train": {"precision": "fp32"}}, "set bf16"),
        ({"train": {"engine": "deepspeed", "zero_stage": 3}}, "zero_stage 3 cuts it"),
        ({"parallel": {"tensor": 4}}, "hidden_size must be multiples of 16 x parallel.tensor 4"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    inputs: Path, base: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    values = video(inputs, base, tmp_path / "run")
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    with pytest.raises(ConfigError, match=told):
        load_config(write_config(tmp_path / "config.yaml", values), [])


def test_a_base_in_e4m3_generates_from_any_export(inputs: Path, base: Path, tmp_path: Path) -> None:
    values = video(inputs, base, tmp_path / "run", steps=2, eval_every=0, base_precision=None)
    assert run(tmp_path, values) == 0
    export = tmp_path / "run/export"
    whole, held = load_model(export, dtype=torch.bfloat16), load_model(export, base_precision="fp8")
    assert held.layers[0].mlp.up.weight.dtype == torch.uint8
    assert held.plus["sequential"].layers[0].qkv.weight.dtype == torch.bfloat16  # type: ignore[index, union-attr]
    config = load_config(tmp_path / "config.yaml", [])
    text = torch.ones(1, config.model.text_length, dtype=torch.int64)
    codes = torch.zeros(1, 5, config.model.cells, dtype=torch.int64)
    one, other = (model.logits(text, text.bool(), codes, "sequential") for model in (whole, held))
    assert 0 < (one - other).norm() / one.norm() < 0.1
    (tmp_path / "prompts.txt").write_text("the digit 3 moves left\n")
    command = [str(tmp_path / "prompts.txt"), "--model", str(export), "--out", str(tmp_path / "clips")]
    assert infer.main([*command, "base_precision=fp8", "levels=0"]) == 0
    assert '"base_precision": "fp8"' in (tmp_path / "clips/results.jsonl").read_text()
