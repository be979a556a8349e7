"""Two ranks that are stopped: by signals in a save, a load, a step and at random, by files of the run, by the clock.

Where a fault halts a rank while the signal comes, the moment is known, however busy the machine is.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from small_checkpoints import steps_in
from tiny_run import make_inputs, settings, write_config

from megacog.checkpoint.commit import verify_folder
from megacog.checkpoint.discovery import LATEST, list_checkpoints
from megacog.metrics.record import FILE_NAME, read_records
from megacog.runtime.faults import VARIABLE
from megacog.training.fault_times import measure_signal, summary
from megacog.training.soak_ranks import ForkedRanks
from megacog.training.soak_runs import Layout, Runs, finish, look_at
from megacog.training.switches import SAVE, STOP

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]
SIGNALS = 10


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of 12 steps, with a save every 2."""
    folder = tmp_path_factory.mktemp("runs")
    make_inputs(folder / "inputs")
    return Runs(folder)


def wait_for(condition: Callable[[], object], log: Path, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)


@contextmanager
def ending(ranks: ForkedRanks, log: Path, codes: list[int]) -> Iterator[ForkedRanks]:
    """Context after which all ranks end by themselves, with these codes, and leave no process."""
    try:
        yield ranks
        assert ranks.wait(100) == codes, log.read_text()
        wait_for(lambda: not ranks.processes(), log)
    finally:
        ranks.kill()


@contextmanager
def halted(ranks: ForkedRanks, rank: int, log: Path) -> Iterator[None]:
    """Context that begins when a fault has halted this rank, and after which it goes on."""
    status = Path(f"/proc/{ranks.pids[rank]}/stat")
    wait_for(lambda: status.read_text().rpartition(")")[2].split()[0] == "T", log)
    yield
    os.kill(ranks.pids[rank], signal.SIGCONT)


def steps(run_dir: Path) -> list[int]:
    path = run_dir / FILE_NAME
    return [record["step"] for record in read_records(path) if record["kind"] == "train"] if path.exists() else []


def saved(run_dir: Path) -> int:
    """The step of the newest checkpoint, which must be whole and of the last step."""
    manifest = verify_folder(list_checkpoints(run_dir)[0])
    assert manifest.step == steps(run_dir)[-1]
    return manifest.step


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_run_stopped_in_a_save_in_a_load_and_by_ctrl_c_ends_bit_for_bit_as_an_undisturbed_one(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    layout, run_dir = Layout("torch", 0, 2, 1, asynchronous, "base"), tmp_path / "run"
    reference = runs.reference(layout)

    def stop(number: int, rank: int, fault: str, give: Callable[[list[int]], None]) -> int:
        monkeypatch.setenv(VARIABLE, f"rank:{rank},{fault},kind:stop")
        log = tmp_path / f"start-{number}.log"
        ranks = runs.start(layout, tmp_path, number)
        assert isinstance(ranks, ForkedRanks)
        with ending(ranks, log, [85, 85]), halted(ranks, rank, log):
            give(ranks.pids)
        monkeypatch.delenv(VARIABLE)
        return saved(run_dir)

    def in_a_save(pids: list[int]) -> None:
        assert steps_in(run_dir) == [2], "a checkpoint is published before its slowest rank has written"
        assert (run_dir / "checkpoints" / LATEST).read_text() == "step-0000002\n"
        os.kill(pids[0], signal.SIGTERM)

    def to_all(pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)

    def as_ctrl_c(pids: list[int]) -> None:
        for group in pids:  # with all that the ranks have started
            os.killpg(group, signal.SIGINT)

    # A save that goes on beside training leaves the next step's flag to be sent before the signal comes.
    first = stop(0, 1, "step:4,phase:save", in_a_save)
    assert first in ((5, 6) if asynchronous else (5,)) and steps_in(run_dir) == [4, first]
    assert stop(1, 1, "phase:load", to_all) == first, "stopped before a step: nothing to save"
    assert stop(2, 0, "step:9,phase:forward", as_ctrl_c) == 9
    finish(runs.start(layout, tmp_path, 3), tmp_path)
    assert look_at(run_dir) == reference.ended


def test_save_and_stop_files_and_max_minutes_act_on_a_running_job(runs: Runs, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    values = settings(runs.folder / "inputs", run_dir, "base", engine="torch", steps=100_000, eval_every=0)
    config = write_config(tmp_path / "run.yaml", values | {"checkpoint": {"every": 0}})

    def start(codes: list[int], *overrides: str) -> AbstractContextManager[ForkedRanks]:
        return ending(ForkedRanks(["--config", str(config), *overrides], 2, log), log, codes)

    with start([85, 85]) as ranks:
        wait_for(lambda: steps(run_dir), log)
        (run_dir / SAVE).touch()
        wait_for(lambda: list_checkpoints(run_dir), log)
        (wanted,) = steps_in(run_dir)
        wait_for(lambda: steps(run_dir)[-1] > wanted + 2, log)
        assert ranks.poll() == [None, None] and not (run_dir / SAVE).exists() and steps_in(run_dir) == [wanted]
        (run_dir / STOP).touch()
    stopped = saved(run_dir)
    assert f"stopped at step {stopped} by the file {run_dir / STOP}" in log.read_text()

    with start([75, 75]):
        pass
    assert "remove the file to go on" in log.read_text() and saved(run_dir) == stopped
    (run_dir / STOP).unlink()

    with start([85, 85], "train.max_minutes=0.02"):
        pass
    last = saved(run_dir)
    assert f"stopped at step {last} by train.max_minutes" in log.read_text()
    assert steps(run_dir) == list(range(1, last + 1)) and last > stopped


def test_a_run_has_saved_and_left_a_step_a_save_and_two_seconds_after_a_signal(
    runs: Runs, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    values = settings(runs.folder / "inputs", tmp_path / "run", "base", engine="torch", eval_every=3)
    config = write_config(tmp_path / "run.yaml", values | {"checkpoint": {"every": 3}})
    for _ in range(4):  # other work on the machine may hold up one of a series
        cases = [measure_signal(config, 2, number % 2, random.random()) for number in range(SIGNALS)]
        for case in cases:
            assert case.codes == [85, 85] and case.orphans == 0 and case.named, case.output
        found = summary(cases)["signal"]
        if found["max"] <= 2:
            break
    figure(f"signal to saved and left, seconds beyond a step and a save: {found}")
    assert found["max"] <= 2
