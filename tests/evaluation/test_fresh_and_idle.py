"""The proofs about fresh and idle attention-plus sets, and that they notice when it is not so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_model import build_model, model_config

from megacog.checkpoint.export import save_export
from megacog.config.schema import Config
from megacog.errors import CheckpointError
from megacog.evaluation import fresh, idle
from megacog.model.transformer import CogVideo


def export(folder: Path, model: CogVideo) -> Path:
    train = {"stage": "base", "run_dir": "run", "steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    config = {"model": model_config().model_dump(), "tokenizer": {"text": "t", "frames": "f"}, "train": train}
    tokenizer = folder.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    save_export(folder, Config.model_validate(config), dict(model.named_parameters()), tokenizer, tokenizer)
    return folder


def test_a_fresh_set_is_proved_equal_to_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = export(tmp_path / "base", build_model(plus=()))
    assert fresh.main([str(path)]) == 0
    assert "all within" in capsys.readouterr().out


def test_a_set_that_differs_from_the_base_is_noticed(tmp_path: Path) -> None:
    model = fresh.fresh_model(export(tmp_path / "base", build_model(plus=())), "sequential", own_frame=True)
    with torch.no_grad():
        model.plus["sequential"].layers[1].dense.bias[0] += 0.1
    assert fresh.difference(model, "sequential", range(5))[1] > fresh.TOLERANCE


def test_one_changed_bit_of_the_idle_set_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = export(tmp_path / "before", build_model(plus=("sequential",)))
    assert idle.main([str(before), str(export(tmp_path / "after", same_first_set()))]) == 0
    assert "0 changed" in capsys.readouterr().out
    model = same_first_set()
    with torch.no_grad():
        bits = model.plus["sequential"].layers[0].gate.logit.view(torch.int32)
        bits[3] ^= 1
    assert idle.main([str(before), str(export(tmp_path / "flipped", model))]) == 1
    assert "changed: plus.sequential.layers.0.gate.logit" in capsys.readouterr().out


def same_first_set() -> CogVideo:
    """Both sets, base and the sequential one as in a model that holds only the latter."""
    model = build_model()
    model.load_state_dict(build_model(plus=("sequential",)).state_dict(), strict=False)
    return model


def test_two_exports_without_a_newly_trained_set_prove_nothing(tmp_path: Path) -> None:
    path = export(tmp_path / "one", build_model(plus=("sequential",)))
    with pytest.raises(CheckpointError, match="give the export with one"):
        idle.main([str(path), str(path)])
