"""Exports: what goes in comes out bitwise, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_model import build_model, model_config

from megacog.checkpoint.export import load_model, open_export, save_export
from megacog.config.schema import Config
from megacog.errors import CheckpointError
from megacog.model.transformer import CogVideo
from megacog.parallel.tensor import TensorParallel


def run_config() -> Config:
    train = {"stage": "base", "run_dir": "run", "steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    return Config.model_validate(
        {"model": model_config().model_dump(), "tokenizer": {"text": "t", "frames": "f"}, "train": train}
    )


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, CogVideo]:
    model = build_model()
    for kind in ("text", "frame"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "tokenizer.json").write_text(kind)
    path = tmp_path / "export"
    save_export(path, run_config(), dict(model.named_parameters()), tmp_path / "text", tmp_path / "frame")
    return path, model


def test_weights_come_back_bitwise_for_every_tensor_parallel_size(exported: tuple[Path, CogVideo]) -> None:
    path, model = exported
    whole = dict(load_model(path).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(whole[name], parameter), name
    ranks = [dict(load_model(path, parallel=TensorParallel(rank, 4)).named_parameters()) for rank in range(4)]
    for name, parameter in model.named_parameters():
        shard = getattr(parameter, "shard", None)
        parts = [rank[name] for rank in ranks]
        assert torch.equal(shard.gather(parts) if shard else parts[0], parameter), name
        assert getattr(ranks[0][name], "tensor_model_parallel", False) == (shard is not None)


def test_an_export_holds_its_tokenizers_and_names_its_plus_sets(exported: tuple[Path, CogVideo]) -> None:
    export = open_export(exported[0], verify=True)
    assert export.plus == ("sequential", "interpolation")
    assert (export.text_tokenizer / "tokenizer.json").read_text() == "text"
    assert (export.frame_tokenizer / "tokenizer.json").read_text() == "frame"
    only = load_model(exported[0], plus=("interpolation",))
    assert list(only.plus) == ["interpolation"]


def test_damage_is_named(exported: tuple[Path, CogVideo]) -> None:
    path, _ = exported
    weights = path / "model-00001.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="model-00001.safetensors has .* bytes"):
        open_export(path)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        open_export(path, verify=True)
    weights.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        open_export(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        open_export(path)
    with pytest.raises(CheckpointError, match="no export"):
        open_export(path / "nothing")
