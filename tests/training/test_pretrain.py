"""The main job, start to end on one rank."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import make_inputs, settings, write_config

from megacog.checkpoint import saver, store
from megacog.checkpoint.discovery import list_checkpoints
from megacog.checkpoint.export import open_export
from megacog.config.load import load_config
from megacog.errors import EXIT_PREEMPTED, CheckpointError, ConfigError, DataError, EnvError
from megacog.metrics.record import read_records
from megacog.runtime.ranks import discover
from megacog.training import pretrain
from megacog.training.guard import NonFiniteError
from megacog.training.loop import Loop

PROMPT = "the digit 3 moves left"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def run(folder: Path, values: dict[str, Any], *overrides: str) -> int:
    config = write_config(folder / "config.yaml", values)
    return pretrain.main(["--config", str(config), *overrides])


def torch_settings(inputs: Path, run_dir: Path, stage: str = "base", **train: Any) -> dict[str, Any]:
    return settings(inputs, run_dir, stage, engine="torch", **train)


@pytest.fixture(scope="module")
def base(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished base run."""
    folder = tmp_path_factory.mktemp("base")
    values = torch_settings(inputs, folder / "run", steps=40, eval_every=20, gradient_clip=1.0)
    values["samples"] = {"every": 40, "prompts": [PROMPT]}
    assert run(folder, values) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def sequential(inputs: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sequential run on that base."""
    folder = tmp_path_factory.mktemp("sequential")
    values = torch_settings(inputs, folder / "run", "sequential")
    values["model"]["inherit"] = str(base / "export")
    assert run(folder, values) == 0
    return folder / "run"


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == kind]


def numbers(run_dir: Path) -> list[tuple[Any, ...]]:
    """What must be bitwise equal between two runs."""
    keys = ("step", "loss", "frame_loss", "grad_norm", "learning_rate")
    return [tuple(str(line[key]) for key in keys) for line in records(run_dir, "train")]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    export = open_export(run_dir / "export", verify=True)
    return {name: export.tensor(name) for name in export.files}


def assert_same_run(one: Path, other: Path) -> None:
    assert numbers(one) == numbers(other)
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_base_learns_and_the_run_folder_is_complete(base: Path) -> None:
    train = records(base, "train")
    assert [line["step"] for line in train] == list(range(1, 41))
    assert train[-1]["loss"] < 0.85 * train[0]["loss"]
    assert train[0]["loss"] == pytest.approx(math.log(24), rel=0.02)
    assert train[0]["frame_loss"].keys() == {"f0"} and train[0]["samples"] == 8
    assert [line["step"] for line in records(base, "eval")] == [20, 40]
    for name in ("config.yaml", "command.txt", "samples/step-0000040/contact_sheet.png", "export/manifest.json"):
        assert (base / name).is_file(), name
    assert open_export(base / "export").model.boi_id is not None


def test_a_video_stage_freezes_the_base_and_reports_every_predicted_frame(base: Path, sequential: Path) -> None:
    before, after = tensors(base), tensors(sequential)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert open_export(sequential / "export").plus == ("sequential",)
    assert records(sequential, "train")[0]["frame_loss"].keys() == {"f1", "f2", "f3", "f4"}
    assert not torch.equal(after["plus.sequential.layers.0.qkv.weight"], before["layers.0.attention.qkv.weight"]), (
        "attention-plus must have been trained"
    )


@pytest.mark.parametrize("plus_from", ["base", "sequential"])
def test_interpolation_carries_the_idle_set_over_bitwise(
    inputs: Path, sequential: Path, tmp_path: Path, plus_from: str
) -> None:
    values = torch_settings(inputs, tmp_path / "run", "interpolation", steps=2)
    values["model"] |= {"inherit": str(sequential / "export"), "plus_from": plus_from}
    values["samples"] = {"every": 2}
    assert run(tmp_path, values) == 0
    before, after = tensors(sequential), tensors(tmp_path / "run")
    assert open_export(tmp_path / "run/export").plus == ("sequential", "interpolation")
    assert all(torch.equal(before[name], after[name]) for name in before)
    source = "plus.sequential.layers.0.qkv.weight" if plus_from == "sequential" else "layers.0.attention.qkv.weight"
    drift = (after["plus.interpolation.layers.0.qkv.weight"] - before[source]).abs().max()
    assert 0 < drift < 0.05
    assert (tmp_path / "run/samples/step-0000002/contact_sheet.png").is_file()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_gives_the_same_run_bitwise(inputs: Path, base: Path, tmp_path: Path, precision: str) -> None:
    values = torch_settings(inputs, tmp_path / "whole", "sequential", precision=precision)
    values["model"] |= {"inherit": str(base / "export"), "mlp_dropout": 0.1}  # dropout needs the random states
    assert run(tmp_path, values) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-0000008")
    shutil.rmtree(tmp_path / "cut/export")
    assert run(tmp_path, values, f"train.run_dir={tmp_path / 'cut'}", "train.resume=must") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_resumed_run_needs_neither_the_inherited_export_nor_idle_sets_elsewhere(
    inputs: Path, sequential: Path, tmp_path: Path
) -> None:
    inherited = tmp_path / "inherited"
    shutil.copytree(sequential / "export", inherited)
    values = torch_settings(inputs, tmp_path / "run", "interpolation", steps=2)
    values["model"]["inherit"] = str(inherited)
    values["checkpoint"] = {"every": 1}
    assert run(tmp_path, values) == 0
    expected = tensors(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-0000002")
    shutil.rmtree(tmp_path / "run/export")
    shutil.rmtree(inherited)
    assert run(tmp_path, values) == 0
    found = tensors(tmp_path / "run")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_checkpoint_needs_space_for_trained_frozen_and_idle_weights(
    inputs: Path, sequential: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    asked: list[int] = []
    for module in (store, saver):
        monkeypatch.setattr(module, "require_space", lambda _, needed: asked.append(needed))

    def values(name: str) -> dict[str, Any]:
        changed = torch_settings(inputs, tmp_path / name, "interpolation", steps=2, precision=precision, eval_every=0)
        changed["model"]["inherit"] = str(sequential / "export")
        changed["checkpoint"] = {"every": 1}
        return changed

    assert run(tmp_path, values("whole")) == 0
    frozen, first = (folder_bytes(tmp_path / "whole" / name) for name in ("frozen", "checkpoints/step-0000001"))
    overhead = 2 * 120 * 1024 + 2 * 2**17  # some 120 records and two manifests
    assert frozen + first <= asked[0] <= frozen + first + overhead
    assert first <= asked[1] <= first + overhead // 2 and asked[1:] == [asked[1]] * 2
    monkeypatch.undo()

    monkeypatch.setattr("megacog.runtime.files.shutil.disk_usage", lambda _: SimpleNamespace(free=asked[0] - 1))
    with pytest.raises(EnvError, match="not enough disk space"):
        run(tmp_path, values("small"))
    assert not (tmp_path / "small/frozen").exists() and not (tmp_path / "small/checkpoints").exists()


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


def test_a_signal_finishes_the_step_saves_and_exits_85_and_the_rest_is_bitwise(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, torch_settings(inputs, tmp_path / "whole")) == 0
    original = Loop.train_step

    def interrupted(self: Loop, batches: Any, step: int) -> Any:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches, step)

    values = torch_settings(inputs, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "train_step", interrupted)
        assert run(tmp_path, values) == EXIT_PREEMPTED
    assert list_checkpoints(tmp_path / "cut")[0].name == "step-0000003"
    assert not (tmp_path / "cut/export").exists()
    assert run(tmp_path, values) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_samples_and_evaluation_do_not_change_training(inputs: Path, tmp_path: Path) -> None:
    plain = torch_settings(inputs, tmp_path / "plain", eval_every=0)
    plain["model"]["mlp_dropout"] = 0.1
    assert run(tmp_path, plain) == 0
    busy = torch_settings(inputs, tmp_path / "busy", eval_every=2)
    busy["model"]["mlp_dropout"] = 0.1
    busy["samples"] = {"every": 2, "prompts": [PROMPT]}
    busy["generation"] = {"sampler": "clusters", "num_clusters": 3, "top_clusters": 2, "text_bias": 1.0}
    assert run(tmp_path, busy) == 0
    assert_same_run(tmp_path / "plain", tmp_path / "busy")


def test_a_finished_run_is_not_trained_again(inputs: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "run")
    values = torch_settings(inputs, tmp_path / "run", steps=40, gradient_clip=1.0)
    assert run(tmp_path, values) == 0
    assert numbers(tmp_path / "run") == numbers(base)


def test_resume_from_a_foreign_checkpoint_names_every_difference(inputs: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "run")
    values = torch_settings(inputs, tmp_path / "run", steps=50, seed=7)
    values["model"]["num_heads"] = 2
    with pytest.raises(CheckpointError, match=r"model.num_heads was 4 and is 2.*train.seed was 1234 and is 7"):
        run(tmp_path, values)


def test_must_without_a_checkpoint_and_never_with_one_are_refused(inputs: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run(tmp_path, torch_settings(inputs, tmp_path / "new", resume="must"))
    with pytest.raises(CheckpointError, match="never"):
        run(tmp_path, torch_settings(inputs, base, resume="never"))


def test_inheriting_another_shape_names_the_differences(inputs: Path, base: Path, tmp_path: Path) -> None:
    values = torch_settings(inputs, tmp_path / "run", "sequential")
    values["model"] |= {"inherit": str(base / "export"), "hidden_size": 64, "text_positions": 40}
    with pytest.raises(CheckpointError, match="hidden_size is 32 there and 64 here.*text_positions"):
        run(tmp_path, values)


def test_plus_from_a_set_that_the_export_lacks_is_refused(inputs: Path, base: Path, tmp_path: Path) -> None:
    values = torch_settings(inputs, tmp_path / "run", "interpolation")
    values["model"] |= {"inherit": str(base / "export"), "plus_from": "sequential"}
    with pytest.raises(ConfigError, match="holds no plus.sequential"):
        run(tmp_path, values)


@pytest.mark.parametrize(
    ("section", "key", "value", "error", "message"),
    [
        ("model", "image_vocab_size", 25, ConfigError, "codebook_size 24"),
        ("model", "text_vocab_size", 8, ConfigError, "text_vocab_size 8"),
        ("model", "boi_id", 0, ConfigError, "boi_id"),
        ("train", "global_batch_size", 2, None, ""),
        ("model", "grid", [3, 4], DataError, "grid"),
    ],
)
def test_settings_that_do_not_fit_the_files_are_refused(
    inputs: Path, tmp_path: Path, section: str, key: str, value: Any, error: type[Exception] | None, message: str
) -> None:
    values = torch_settings(inputs, tmp_path / "run", steps=1)
    values[section][key] = value
    if error is None:
        assert run(tmp_path, values) == 0
        return
    with pytest.raises(error, match=message):
        run(tmp_path, values)


def test_samples_without_prompts_are_refused_at_the_start(inputs: Path, tmp_path: Path) -> None:
    values = torch_settings(inputs, tmp_path / "run")
    values["samples"] = {"every": 1}
    with pytest.raises(ConfigError, match="samples.prompts"):
        run(tmp_path, values)


def test_samples_from_clusters_that_are_not_there_are_refused_at_the_start(inputs: Path, tmp_path: Path) -> None:
    values = torch_settings(inputs, tmp_path / "run")
    values["samples"] = {"every": 1000, "prompts": [PROMPT]}
    values["generation"] = {"sampler": "clusters", "clusters": str(tmp_path / "none.npy")}
    with pytest.raises(DataError, match="none.npy .* does not exist"):
        run(tmp_path, values)


def test_a_run_whose_loss_is_never_finite_stops_and_names_the_samples(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Loop.inputs

    def poisoned(self: Loop, batch: Any) -> dict[str, Any]:
        return original(self, batch) | {"frame_weights": (float("nan"),)}

    monkeypatch.setattr(Loop, "inputs", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 5.*train-\d+\["):
        run(tmp_path, torch_settings(inputs, tmp_path / "run"))


def test_activation_checkpointing_gives_the_same_run(inputs: Path, base: Path, tmp_path: Path) -> None:
    for policy in ("none", "selective", "full"):
        values = torch_settings(inputs, tmp_path / policy, "sequential", steps=3, activation_checkpointing=policy)
        values["model"]["inherit"] = str(base / "export")
        assert run(tmp_path, values) == 0
    none, *others = (records(tmp_path / policy, "train") for policy in ("none", "selective", "full"))
    for one, other in zip(none * 2, sum(others, []), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_ranks_that_do_not_divide_the_batch_are_refused_before_there_is_a_process_group(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config(tmp_path / "config.yaml", torch_settings(inputs, tmp_path / "run")))
    monkeypatch.setattr(pretrain.dist, "init_process_group", lambda *_, **__: pytest.fail("joined the others"))
    three = dataclasses.replace(discover(), world_size=3)
    with pytest.raises(ConfigError, match="3 data-parallel ranks = .* the nearest that divide"):
        pretrain.check_plan(config, three)
    with pytest.raises(ConfigError, match="^the run does not divide or does not fit: see the message of rank 0$"):
        pretrain.check_plan(config, dataclasses.replace(three, rank=2))


def test_a_base_in_fp8_is_refused_before_ranks_join_on_a_gpu_that_cannot_multiply_it(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch_settings(inputs, tmp_path / "run", "sequential", precision="bf16", base_precision="fp8")
    values["model"]["inherit"] = "none"
    config = load_config(write_config(tmp_path / "config.yaml", values))
    monkeypatch.setattr(pretrain, "rank_device", lambda ranks: torch.device("cuda", 0))
    monkeypatch.setattr(pretrain, "device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match="base_precision fp8 needs compute capability 8.9 .*; NVIDIA A100 has 8.0; "):
        pretrain.check_plan(config, discover())
