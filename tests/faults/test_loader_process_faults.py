"""Loader processes that are killed or hang under a run: replaced, with the same samples; none lost, none twice."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Command, Outcome, TrainingArguments, assert_tells, files
from loader_faults import children, hang, kill, misbehave

from megacog.training.loop import Loop

Figure = Callable[[str], None]
STEPS, SAMPLES = 6, 8
TIMEOUT = 5
"""Seconds: a process that hangs is waited for, a healthy one on a busy machine is not to be taken for one."""


def sha256s(run: Path) -> Any:
    """Checksums of the weights that a run ended with."""
    manifest = json.loads((run / "export/manifest.json").read_text())
    return [entry["sha256"] for name, entry in manifest["files"].items() if name.startswith("model-")]


def metrics(run: Path) -> list[tuple[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["kind"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(autouse=True)
def _no_process_remains() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


@pytest.fixture
def train(
    command: Command, training: TrainingArguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Outcome, list[str]]]:
    """Trains with so many loader processes into a run folder; returns the outcome and the ids of all samples."""
    step, samples = Loop.train_step, []

    def noted(self: Loop, batches: Any, number: int) -> Any:
        report = step(self, batches, number)
        samples.extend(sample for batch in report.micro_batches for sample in batch.sample_ids)
        return report

    monkeypatch.setattr(Loop, "train_step", noted)

    def run(workers: int, folder: str) -> tuple[Outcome, list[str]]:
        arguments = training(train__steps=STEPS, data__workers=workers, data__worker_timeout=TIMEOUT)
        samples.clear()
        outcome = command("pretrain", *arguments, f"train.run_dir={tmp_path / folder}", "checkpoint.every=0")
        return outcome, list(samples)

    return run


def test_processes_that_are_killed_or_hang_lose_no_sample_and_change_no_bit(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    outcome, expected = train(0, "intact")
    assert outcome.code == 0 and len(expected) == STEPS * SAMPLES
    generator = random.Random(3)
    for number, fault in enumerate([kill, hang]):
        with monkeypatch.context() as patch:
            (tmp_path / fault.__name__).mkdir()
            # In the first half: a process may read ahead of the other one, beyond what the run needs.
            misbehave(patch, tmp_path / fault.__name__, fault, [generator.randrange(STEPS * SAMPLES // 2)])
            outcome, found = train(2, f"run-{number}")
        assert outcome.code == 0, outcome.err
        assert_tells(outcome.err, r"a loader process .* while reading clip '.*' of .*train.h5; it is replaced")
        assert Counter(found) == Counter(expected) and found == expected
        assert metrics(tmp_path / f"run-{number}") == metrics(tmp_path / "intact")
        assert sha256s(tmp_path / f"run-{number}") == sha256s(tmp_path / "intact")
    figure(f"loader processes: 1 killed, 1 hung; {STEPS * SAMPLES} samples each, 0 lost, 0 twice, same weights")


@pytest.mark.parametrize(
    ("fault", "message"),
    [(kill, r"died \(signal SIGKILL\)"), (hang, r"gave nothing for 5 s \(data.worker_timeout\)")],
)
def test_processes_that_fail_again_end_the_run_with_the_clip_s_name(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None], message: str
) -> None:
    (tmp_path / "reads").mkdir()
    misbehave(monkeypatch, tmp_path / "reads", fault, range(12, 1000))
    outcome, _ = train(1, "run")
    assert outcome.code == 1
    assert_tells(outcome.message, f"a loader process {message} while reading clip 'train-.*' of .*train.h5.*so did the")
    assert not any("export" in name or ".tmp-" in name for name in files(tmp_path / "run"))


def test_an_error_in_a_process_ends_the_run_with_its_traceback_and_leaves_no_process(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a bug")

    (tmp_path / "reads").mkdir()
    misbehave(monkeypatch, tmp_path / "reads", fail, [9])
    with pytest.raises(RuntimeError, match=r"(?s)a loader process failed while reading clip .*Error: a bug"):
        train(2, "run")
