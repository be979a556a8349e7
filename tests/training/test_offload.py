"""An optimizer in the host's memory trains as one on the device."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_inputs, settings, write_config

from megacog.checkpoint.export import open_export
from megacog.config.load import load_config
from megacog.errors import ConfigError
from megacog.metrics.record import read_records
from megacog.training import pretrain
from megacog.training.comparison import small_config
from megacog.training.engine import deepspeed_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def values(inputs: Path, run_dir: Path, **train: Any) -> dict[str, Any]:
    train = {"precision": "bf16", "offload_optimizer": True, "gradient_clip": 0.05} | train
    return settings(inputs, run_dir, "base", **train)


def run(folder: Path, run_values: dict[str, Any], *overrides: str) -> None:
    assert pretrain.main(["--config", str(write_config(folder / "config.yaml", run_values)), *overrides]) == 0


def numbers(run_dir: Path) -> list[tuple[float, float]]:
    lines = [line for line in read_records(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def test_it_trains_as_on_the_device(inputs: Path, tmp_path: Path) -> None:
    exact = {"precision": "fp32", "learning_rate": 1e-3, "eval_every": 0}
    run(tmp_path, values(inputs, tmp_path / "host", **exact))
    run(tmp_path, values(inputs, tmp_path / "device", **exact, offload_optimizer=False))
    host, device = numbers(tmp_path / "host"), numbers(tmp_path / "device")
    assert len(host) == 8 and min(norm for _, norm in host) > 0.05, "clipping must be active"
    assert host[-1][0] < host[0][0]
    for mine, theirs in zip(host, device, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)  # fused arithmetic rounds otherwise


def test_resuming_is_bitwise(inputs: Path, tmp_path: Path) -> None:
    run(tmp_path, values(inputs, tmp_path / "host"))
    shutil.copytree(tmp_path / "host", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-0000008")
    shutil.rmtree(tmp_path / "cut/export")
    run(tmp_path, values(inputs, tmp_path / "cut"), "train.resume=must")
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "host")
    one, other = (open_export(tmp_path / name / "export") for name in ("host", "cut"))
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.files)


def test_a_checkpoint_from_the_host_goes_on_on_the_device(inputs: Path, tmp_path: Path) -> None:
    exact = {"precision": "fp32", "learning_rate": 1e-3, "eval_every": 0}
    run(tmp_path, values(inputs, tmp_path / "run", **exact))
    host = numbers(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-0000008")
    shutil.rmtree(tmp_path / "run/export")
    run(tmp_path, values(inputs, tmp_path / "run", **exact, offload_optimizer=False), "train.resume=must")
    for mine, theirs in zip(numbers(tmp_path / "run"), host, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_deepspeed_is_told_to_offload_and_to_take_the_optimizer_it_is_given() -> None:
    config = small_config("deepspeed", 1, 1, 1, "bf16")
    config = config.model_copy(update={"train": config.train.model_copy(update={"offload_optimizer": True})})
    generated = deepspeed_config(config, 1)
    assert generated["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert generated["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    "train, told",
    [({"engine": "torch"}, "engine deepspeed"), ({"zero_stage": 2}, "bf16 on the host"), ({"zero_stage": 3}, "with 3")],
)
def test_other_engines_and_zero_stages_are_refused(
    inputs: Path, tmp_path: Path, train: dict[str, Any], told: str
) -> None:
    path = write_config(tmp_path / "config.yaml", values(inputs, tmp_path / "run", **train))
    with pytest.raises(ConfigError, match=told):
        load_config(path, [])


def test_the_offload_has_one_key(inputs: Path, tmp_path: Path) -> None:
    settings_twice = values(inputs, tmp_path / "run")
    settings_twice["deepspeed"] = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match=r"set train\.offload_optimizer instead"):
        load_config(write_config(tmp_path / "config.yaml", settings_twice), [])
