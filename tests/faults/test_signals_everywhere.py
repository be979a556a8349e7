"""Signals to the processes of a run under real launchers: saved at the current step, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mpi_ranks import BIN, MPIRUN, mpi_environment
from run_ranks import ROOT, python_environment
from tiny_run import make_inputs, settings, write_config

from megacog.checkpoint.discovery import list_checkpoints
from megacog.metrics.record import read_records
from megacog.runtime.ranks import free_port
from megacog.training.soak_ranks import ForkedRanks

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]
LAUNCHERS = {
    "deepspeed": lambda: [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())],
    "torchrun": lambda: [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    "mpirun": lambda: [MPIRUN, "-n", "2", "--bind-to", "none", sys.executable],
}
HITS = [
    ("deepspeed", "deepspeed.launcher.launch", signal.SIGUSR1, 0), ("deepspeed", "bin/deepspeed", signal.SIGTERM, -15),
    ("torchrun", "bin/torchrun", signal.SIGKILL, -9), ("torchrun", "launch/pretrain.py", signal.SIGUSR1, 1),
    ("mpirun", None, signal.SIGUSR1, 85),
]  # fmt: skip
"""Launcher, program that the signal hits (None = the command), signal, exit code of the command. The last but one is
a rank, mpirun passes it on to all ranks, and the others end without a word to them."""
SIGNAL_AFTER = """
import os, runpy, signal, sys
from megacog.training import pretrain
_, name, *sys.argv = sys.argv
act = getattr(pretrain, name)
def act_and_signal(*arguments):
    result = act(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
    return result
setattr(pretrain, name, act_and_signal)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a program, given after the name of a function of pretrain.py that is followed by SIGTERM."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@contextmanager
def started(launcher: list[str], inputs: Path, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run of 100,000 steps that only saves when it is told to; its output is in `folder`/output."""
    values = settings(inputs, folder / "run", "base", engine="torch", steps=100_000, eval_every=0)
    config = write_config(folder / "run.yaml", values | {"checkpoint": {"every": 0}})
    command = [*launcher, str(ROOT / "launch/pretrain.py"), "--config", str(config)]
    environment = mpi_environment() if launcher[0] == MPIRUN else python_environment()
    with open(folder / "output", "wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        for pid in members(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def members(folder: Path, program: str = "") -> list[int]:
    """Living processes of the run whose configuration is in `folder`, all or those of one program."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            # python [-u] [-m] program ...
            if any(str(folder) in word for word in words) and any(word.endswith(program) for word in words[1:4]):
                found.append(int(entry.name))
    return sorted(found)


def wait_for(condition: Callable[[], object], folder: Path, seconds: float = 280) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, (folder / "output").read_text()[-3000:]
        time.sleep(0.05)


def steps(folder: Path) -> list[int]:
    path = folder / "run/metrics.jsonl"
    return [record["step"] for record in read_records(path) if record["kind"] == "train"] if path.exists() else []


@pytest.mark.parametrize(("launcher", "victim", "number", "code"), HITS)
def test_the_run_is_saved_at_its_last_step_leaves_no_process_and_goes_on_from_there(
    inputs: Path, tmp_path: Path, launcher: str, victim: str | None, number: signal.Signals, code: int
) -> None:
    with started(LAUNCHERS[launcher](), inputs, tmp_path) as process:
        wait_for(lambda: len(steps(tmp_path)) > 3, tmp_path)
        os.kill(process.pid if victim is None else members(tmp_path, victim)[-1], number)
        wait_for(lambda: process.poll() is not None and not members(tmp_path), tmp_path, 60)
    last = steps(tmp_path)[-1]
    assert process.returncode == code and list_checkpoints(tmp_path / "run")[0].name == f"step-{last:07d}"
    again = ForkedRanks(["--config", str(tmp_path / "run.yaml"), f"train.steps={last + 1}"], 2, tmp_path / "output")
    assert again.wait(100) == [0, 0], (tmp_path / "output").read_text()[-3000:]
    assert steps(tmp_path) == list(range(1, last + 2))


@pytest.mark.parametrize("function", ["discover", "announce"])
def test_a_signal_before_the_first_step_leaves_with_nothing_to_save(
    inputs: Path, tmp_path: Path, function: str
) -> None:
    with started([sys.executable, "-c", SIGNAL_AFTER, function], inputs, tmp_path) as process:
        assert process.wait(120) == 85
    assert "stopped at step 0 by SIGTERM" in (tmp_path / "output").read_text()
    assert not list_checkpoints(tmp_path / "run")
