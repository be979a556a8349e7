"""Which settings may change when a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from megacog.config.schema import Config
from megacog.errors import CheckpointError
from megacog.training.comparison import small_config
from megacog.training.same_run import RULES, check_same_run, rule_for

DOCS = Path(__file__).parents[2] / "docs/training.md"


def keys(section: BaseModel, prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    found = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        found += keys(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [prefix + name]
    return found


def changed(saved: dict[str, Any], key: str) -> dict[str, Any]:
    """The same settings with another value of one key."""
    section, _, rest = key.partition(".")
    return saved | {section: changed(saved[section], rest) if rest else "another"}


def test_every_setting_has_a_rule_and_every_rule_a_setting() -> None:
    known = keys(small_config("torch", 0, 1, 1))
    assert len(known) > 80
    used = {rule_for(key).keys for key in known}
    assert used == {rule.keys for rule in RULES}
    for rule in RULES:
        assert all(any(key == own or key.startswith(own + ".") for key in known) for own in rule.keys)


@pytest.mark.parametrize("key", keys(small_config("torch", 0, 1, 1)))
def test_a_change_is_refused_logged_or_passed_over(key: str, caplog: pytest.LogCaptureFixture) -> None:
    config = small_config("torch", 0, 1, 1)
    saved = changed(config.model_dump(mode="json"), key)
    verdict = rule_for(key).verdict
    if verdict == "refused" and key != "model.inherit":  # that one may have moved
        with pytest.raises(CheckpointError, match=f"belongs to another run: {key} was 'another' and is"):
            check_same_run(saved, config, Path("step-1"))
    else:
        check_same_run(saved, config, Path("step-1"))
    assert (f"settings changed since the checkpoint: {key}" in caplog.text) == (verdict == "logged")


def test_what_decides_over_weights_and_samples_is_refused() -> None:
    names = ("model.hidden_size", "model.text_vocab_size", "model.attention.sequential", "train.seed", "train.stage")
    assert {rule_for(key).verdict for key in names} == {"refused"}
    assert {rule_for(key).verdict for key in ("train.learning_rate", "data.train", "loss.frame_weights")} == {"logged"}


def test_the_documentation_has_the_table_of_rules() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for rule in RULES:
        assert f"| {', '.join(f'`{key}`' for key in rule.keys)} | {rule.verdict} | {rule.why} |" in text


def test_a_setting_that_an_older_checkpoint_did_not_know_is_no_other_run(caplog: pytest.LogCaptureFixture) -> None:
    config: Config = small_config("torch", 0, 1, 1)
    saved = config.model_dump(mode="json")
    del saved["train"]["offload_optimizer"]
    check_same_run(saved, config, Path("step-1"))
    assert "train.offload_optimizer was None and is False" in caplog.text
