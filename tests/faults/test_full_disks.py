"""No space for a checkpoint on one rank or on all: the same error everywhere, older checkpoints stay, training goes on.

One rank and every other kind of file: tests/cli/test_full_disk.py.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import steps_in
from tiny_run import make_inputs, settings, write_config

from megacog.metrics.record import read_records
from megacog.runtime.faults import VARIABLE
from megacog.training import pretrain
from megacog.training.soak_ranks import ForkedRanks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
STEPS, FULL = 6, 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def run(inputs: Path, run_dir: Path, **checkpoint: Any) -> tuple[list[int | None], str]:
    """Exit codes of two ranks, and what they have logged."""
    values = settings(inputs, run_dir, "base", engine="torch", steps=STEPS, eval_every=0, global_batch_size=4)
    values["checkpoint"] = {"every": 2, "keep_last": 9} | checkpoint
    log = run_dir.with_suffix(".log")
    ranks = ForkedRanks(["--config", str(write_config(run_dir.with_suffix(".yaml"), values))], 2, log)
    codes = ranks.wait(120)
    ranks.kill()
    return codes, log.read_text()


@pytest.mark.parametrize(
    ("whom", "on_error", "asynchronous"),
    [
        ("rank:0,", "stop", True), ("rank:1,", "stop", False), ("", "stop", True),
        ("rank:0,", "continue", False), ("rank:1,", "continue", True), ("", "continue", False),
    ],
)  # fmt: skip
def test_no_space_on_some_ranks_is_the_same_error_on_all(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None], whom: str,
    on_error: str, asynchronous: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv(VARIABLE, f"{whom}step:{FULL},phase:save,kind:enospc")
    codes, log = run(inputs, tmp_path / "run", on_error=on_error, asynchronous=asynchronous)
    first = whom or "rank:0,"
    assert f"rank {first[5]} on " in log and "No space left on device" in log and "bytes needed" in log
    left = steps_in(tmp_path / "run")
    if on_error == "stop":
        assert codes == [1, 1] and left == [2], log
        assert len(re.findall("^error: ", log, re.MULTILINE)) == 2, "one message on each rank"
        monkeypatch.delenv(VARIABLE)
        assert run(inputs, tmp_path / "run") == ([0, 0], (tmp_path / "run.log").read_text())
        assert steps_in(tmp_path / "run") == [2, 4, 6]
    else:
        assert codes == [0, 0] and left == [2, 6], log
        failures = [r["failures"] for r in read_records(tmp_path / "run/metrics.jsonl") if r["kind"] == "checkpoint"]
        assert failures == [0, 1, 1]
    assert not [path.name for path in (tmp_path / "run").rglob(".*")]
    outcome = f"exit codes {codes}, checkpoints {left}"
    figure(f"full disk: {whom or 'all ranks'} {on_error} {'async' if asynchronous else 'sync'}: {outcome}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here; injected errors are tested above")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_others_fill_costs_checkpoints_until_it_has_room_again(
    inputs: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    balloon, train_step = small_disk / "balloon", pretrain.Loop.train_step

    def fill_or_empty(self: pretrain.Loop, batches: Any, step: int) -> Any:
        if step == 3:  # leaves less than a checkpoint, in single pages
            with pytest.raises(OSError), open(balloon, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if step == 5:
            balloon.unlink()
        return train_step(self, batches, step)

    monkeypatch.setattr(pretrain.Loop, "train_step", fill_or_empty)
    values = settings(inputs, small_disk / "run", "base", engine="torch", steps=STEPS, eval_every=0)
    values["checkpoint"] = {"every": 2, "keep_last": 9, "on_error": "continue", "asynchronous": False}
    assert pretrain.main(["--config", str(write_config(tmp_path / "config.yaml", values))]) == 0
    assert steps_in(small_disk / "run") == [2, 6]
    records = [r for r in read_records(small_disk / "run/metrics.jsonl") if r["kind"] == "checkpoint"]
    assert [record["failures"] for record in records][-1] == 1, "metrics of a full disk may be missing, the count not"
