"""Starts several ranks of a program and waits for them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megacog.errors import EXIT_PREEMPTED
from megacog.runtime.ranks import discover, free_port

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finished:
    """Exit codes and outputs, in rank order."""

    codes: list[int]
    outputs: list[str]

    def assert_success(self) -> None:
        for rank, (code, output) in enumerate(zip(self.codes, self.outputs, strict=True)):
            assert code == 0, f"rank {rank} exited with {code}:\n{output[-4000:]}"


class Ranks:
    """Processes with a torchrun-like environment; all are gone when the context ends.

    Args:
        arguments: What python runs, e.g. ["launch/pretrain.py", "--config", "x.yaml"].
        world_size: How many ranks.
        folder: Where outputs go.
    """

    def __init__(self, arguments: list[str], world_size: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
        self._arguments = arguments
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Ranks:
        port, world_size = free_port(), len(self.logs)
        for rank, path in enumerate(self.logs):
            place = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            environment = python_environment() | {name: str(value) for name, value in place.items()}
            with open(path, "wb") as log:
                command = [sys.executable, *self._arguments]
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait(self, timeout: float) -> Finished:
        """Wait for all ranks; those that run longer than `timeout` seconds are killed and count as failed.

        When one rank fails the others get ten more seconds, as they may hang in a collective.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            codes = [process.poll() for process in self.processes]
            if None not in codes:
                break
            if any(code not in (None, 0, EXIT_PREEMPTED) for code in codes):
                deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.05)
        self.__exit__()
        return Finished([process.returncode for process in self.processes], [log.read_text() for log in self.logs])


@contextmanager
def one_rank() -> Iterator[None]:
    """This process as a world of its own."""
    with mock.patch.dict(os.environ):
        discover()
        dist.init_process_group("gloo")
        try:
            yield
        finally:
            dist.destroy_process_group()


def run_ranks(arguments: list[str], world_size: int, folder: Path, timeout: float = 240) -> Finished:
    """Run all ranks to their end."""
    with Ranks(arguments, world_size, folder) as ranks:
        return ranks.wait(timeout)


def run_jobs(jobs: list[str], world_size: int, folder: Path, timeout: float = 240) -> dict[str, list[Any]]:
    """By job of rank_jobs.py, the results in rank order. All jobs share the processes."""
    run_ranks(["tests/rank_jobs.py", str(folder), *jobs], world_size, folder / "logs", timeout).assert_success()
    return json.loads((folder / "result.json").read_text())


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills once, even when several test processes (pytest-xdist) ask for it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all test processes of this session
    folder, finished = root / name, root / f"{name}.finished"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder


def python_environment() -> dict[str, str]:
    """This process's environment with the repository importable and one thread per process."""
    rank_variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in rank_variables}
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
