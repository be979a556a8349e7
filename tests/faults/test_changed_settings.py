"""Settings that are changed before a run is resumed: refused if the run would be another one, told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import settings

from megacog.config.schema import Config
from megacog.errors import CheckpointError
from megacog.training.state import check_same_run

REFUSED = {
    "model.num_layers": 3,
    "model.hidden_size": 64,
    "model.num_heads": 2,
    "model.grid": [8, 4],
    "model.image_vocab_size": 25,
    "model.text_vocab_size": 97,
    "model.text_length": 25,
    "model.embedding_dropout": 0.5,
    "train.stage": "interpolation",
    "train.precision": "bf16",
    "train.seed": 4321,
    "train.global_batch_size": 4,
}
TOLD = {
    "train.learning_rate": 0.5,
    "train.steps": 9,
    "train.micro_batch_size": 4,
    "train.engine": "torch",
    "train.zero_stage": 2,
    "train.weight_decay": 0.5,
    "train.gradient_clip": 0.5,
    "train.activation_checkpointing": "full",
    "data.train": [{"path": "elsewhere.h5"}],
    "data.caption_dropout": 0.5,
    "data.workers": 3,
    "parallel.tensor": 2,
}
QUIET = {"checkpoint.every": 3, "checkpoint.asynchronous": False, "metrics.tensorboard": True, "samples.seed": 5}


def config(changed: str | None = None, value: Any = None) -> Config:
    values = settings(Path("inputs"), Path("run"), "sequential")
    values["model"]["inherit"] = "base"
    if changed is not None:
        section, _, key = changed.partition(".")
        values.setdefault(section, {})[key] = value
    return Config.model_validate(values)


def check(key: str, value: Any) -> None:
    check_same_run(config().model_dump(mode="json"), config(key, value), Path("step-0000002"))


@pytest.mark.parametrize(("key", "value"), REFUSED.items())
def test_what_would_make_it_another_run_is_refused_with_both_values(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"step-0000002 belongs to another run: .*{key}(\.\d+)? was .* and is "):
        check(key, value)


@pytest.mark.parametrize(("key", "value"), TOLD.items())
def test_what_changes_how_the_run_goes_on_is_told(key: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    check(key, value)
    assert f"settings changed since the checkpoint: {key}" in caplog.text


@pytest.mark.parametrize(("key", "value"), QUIET.items())
def test_what_changes_only_what_is_kept_or_shown_is_not(
    key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    check(key, value)
    assert "settings changed" not in caplog.text
