"""Which settings a run may change from one start to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megacog.config.schema import Config
from megacog.errors import CheckpointError
from megacog.runtime.log import SHARED, get_logger

log = get_logger(__name__)

Verdict = Literal["refused", "logged", "silent"]


@dataclass(frozen=True)
class Rule:
    """What becomes of a change of some settings."""

    keys: tuple[str, ...]
    """Keys or sections, with all that is in them."""
    verdict: Verdict
    why: str

    def covers(self, key: str) -> bool:
        return any(key == own or key.startswith(own + ".") for own in self.keys)


RULES = (
    Rule(("model.embedding_dropout", "model.mlp_dropout"), "logged", "no weight depends on it"),
    Rule(("model",), "refused", "shapes and meaning of the weights, and what they started from"),
    Rule(("train.stage",), "refused", "other weights would be trained"),
    Rule(("train.precision",), "refused", "masters would be missing, or weights of another precision"),
    Rule(
        ("train.seed", "train.global_batch_size"), "refused",
        "samples go on where the checkpoint's step ended in their order, which these decide",
    ),
    Rule(
        ("parallel", "train.engine", "train.zero_stage", "train.micro_batch_size"), "logged",
        "sums run in another order: the same to rounding",
    ),
    Rule(
        (
            "samples", "metrics", "generation", "checkpoint", "cluster", "watch", "train.run_dir", "train.resume",
            "train.max_minutes", "train.log_every", "train.threads", "train.memory_check",
        ),
        "silent", "nothing that is trained depends on it",
    ),
    Rule(("data", "tokenizer", "loss", "train", "deepspeed"), "logged", "taken as it is now, from the next step on"),
)  # fmt: skip
"""The first that covers a key decides. Tokenizers themselves are compared by their fingerprints."""


def rule_for(key: str) -> Rule:
    """The rule that decides about a key."""
    return next(rule for rule in RULES if rule.covers(key))


def check_same_run(saved: Mapping[str, Any], config: Config, path: Path) -> None:
    """Refuse a checkpoint of another model, stage or order of samples; log settings that changed otherwise.

    Args:
        saved: The configuration in the checkpoint's manifest.
        config: That of this start.
        path: The checkpoint.

    Raises:
        CheckpointError: Names every difference that cannot be resumed over.
    """
    refused, logged = [], []
    for key, (before, now) in _leaf_differences(saved, config.model_dump(mode="json")).items():
        text = f"{key} was {before!r} and is {now!r}"
        verdict = rule_for(key).verdict
        if key == "model.inherit" and not _another_export(before, now):
            continue
        if verdict == "refused":
            refused.append(text)
        elif verdict == "logged":
            logged.append(text)
    if refused:
        raise CheckpointError(
            f"{path} belongs to another run: " + "; ".join(refused) + ". Use another train.run_dir (and model.inherit "
            "to start from this one's export), or restore these settings"
        )
    for text in logged:
        log.warning("settings changed since the checkpoint: %s", text, extra=SHARED)


def _another_export(before: Any, now: Any) -> bool:
    """Whether a run would start from something else; a resumed one does not read it, so it may have moved or gone."""
    paths = [Path(str(path)) for path in (before, now)]
    return all(path.exists() for path in paths) and not paths[0].samefile(paths[1])


def _leaf_differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(set(old) | set(new)):
            found |= _leaf_differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return {} if old == new else {prefix: (old, new)}
