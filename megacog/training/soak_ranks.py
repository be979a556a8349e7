"""Ranks of a training run that are started to be killed.

Forked ones leave python, torch and DeepSpeed imported by their parent: a start takes half a second instead of ten. What
they run is the same `megacog.training.pretrain.main` as a command's, which launched ones are.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megacog.errors import EXIT_FAULT
from megacog.runtime.cli import run
from megacog.runtime.processes import die_with
from megacog.runtime.ranks import free_port
from megacog.training import pretrain

ROOT = Path(__file__).resolve().parents[2]
_MARK = "MEGACOG_SOAK"
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Process:
    """A living process."""

    pid: int
    command: str


class StartedRanks(ABC):
    """The processes of one start of a run."""

    @abstractmethod
    def poll(self) -> list[int | None]:
        """Exit codes as `subprocess` gives them, of the ranks or of their launcher; None of those that run."""

    @abstractmethod
    def kill_rank(self, rank: int) -> bool:
        """SIGKILL to one rank; whether it was there."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL to every process that this start made, until none is left."""

    @abstractmethod
    def processes(self) -> list[Process]:
        """What of this start still runs, helpers of ranks included."""

    def wait(self, seconds: float) -> list[int | None]:
        """Wait for all to end by themselves; exit codes, None of those that did not."""
        deadline = time.monotonic() + seconds
        while None in (codes := self.poll()) and time.monotonic() < deadline:
            time.sleep(0.005)
        return codes


class ForkedRanks(StartedRanks):
    """Ranks as children of this process, which must never have computed anything.

    Args:
        arguments: Of pretrain.py.
        ranks: How many.
        log: Where they all write.
    """

    def __init__(self, arguments: Sequence[str], ranks: int, log: Path) -> None:
        self._codes: dict[int, int | None] = {}
        self._mark = uuid.uuid4().hex
        port = str(free_port())
        for rank in range(ranks):
            numbers = (str(rank), str(ranks), str(rank), str(ranks), "127.0.0.1", port)
            place = dict(zip(_RANK_VARIABLES, numbers, strict=True)) | {_MARK: self._mark}
            pid = fork(lambda place=place: _be_rank(arguments, place, log))  # type: ignore[misc]
            with suppress(OSError):  # it has done so itself, and ended
                os.setpgid(pid, pid)
            self._codes[pid] = None
        self.pids = list(self._codes)

    def poll(self) -> list[int | None]:
        for pid, code in self._codes.items():
            if code is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self._codes[pid] = os.waitstatus_to_exitcode(status)
        return list(self._codes.values())

    def kill_rank(self, rank: int) -> bool:
        if self.poll()[rank] is not None:
            return False
        os.kill(self.pids[rank], signal.SIGKILL)
        return True

    def kill(self) -> None:
        _kill_all(self.processes)
        self.wait(60)

    def signal_all(self, number: signal.Signals) -> None:
        """A signal to every process: SIGSTOP and SIGCONT suspend the run as a whole and continue it."""
        for process in self.processes():
            _send(process.pid, number)

    def processes(self) -> list[Process]:
        """By their groups; what ranks have started in groups of its own by its environment."""
        return _find(self._mark, self.pids)


class LaunchedRanks(StartedRanks):
    """Ranks under `deepspeed` or `torchrun`, from nothing.

    Args:
        launcher: "deepspeed" or "torchrun".
        arguments: Of pretrain.py.
        ranks: How many.
        log: Where they all write.
    """

    def __init__(self, launcher: str, arguments: Sequence[str], ranks: int, log: Path) -> None:
        self._mark = uuid.uuid4().hex
        port, count = str(free_port()), str(ranks)
        if launcher == "deepspeed":
            command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", count]
            command += ["--master_port", port]
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", count]
            command += ["--master_addr", "127.0.0.1", "--master_port", port]
        environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
        paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), _MARK: self._mark}
        with open(log, "ab") as file:
            self._launcher = subprocess.Popen(
                [*command, str(ROOT / "launch/pretrain.py"), *arguments], cwd=ROOT, env=environment,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip

    def poll(self) -> list[int | None]:
        return [self._launcher.poll()]

    def kill_rank(self, rank: int) -> bool:
        for process in self.processes():
            environment = _environment(process.pid)
            if "pretrain.py" in process.command and environment.get("RANK") == str(rank):
                state = _state(process.pid)
                if state is not None and "RANK" not in _environment(state.parent):  # not one of its loader processes
                    _send(process.pid, signal.SIGKILL)
                    return True
        return False

    def kill(self) -> None:
        _kill_all(self.processes)
        self._launcher.wait(60)

    def processes(self) -> list[Process]:
        return _find(self._mark)


def fork(work: Callable[[], int | None]) -> int:
    """The pid of a child that does `work`, leaves with the code it returns, and dies with this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent, pid = os.getpid(), os.fork()
    if pid:
        return pid
    code = EXIT_FAULT
    try:
        die_with(parent)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        code = work() or 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else EXIT_FAULT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _be_rank(arguments: Sequence[str], environment: dict[str, str], log: Path) -> NoReturn:
    os.setpgid(0, 0)
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(descriptor, "w", buffering=1)  # whatever they were in the parent
    run(lambda: pretrain.main(list(arguments)), leave=os._exit)


def _kill_all(processes: Callable[[], list[Process]]) -> None:
    """SIGKILL until none is left; new ones may appear meanwhile."""
    while alive := processes():
        for process in alive:
            _send(process.pid, signal.SIGKILL)
        time.sleep(0.002)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _find(mark: str, groups: Sequence[int] = ()) -> list[Process]:
    """Processes of these groups, or whose environment carries this mark, ranks first; not those that are dead.

    A process that has not called exec shows the environment of its parent.
    """
    wanted, found = f"{_MARK}={mark}".encode(), []
    for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        state = _state(pid)
        if state is None or state.dead:
            continue
        if state.group in groups or wanted in _read(f"/proc/{pid}/environ").split(b"\0"):
            command = _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
            found.append(Process(pid, "rank" if pid in groups else command))
    return sorted(found, key=lambda process: process.command != "rank")


def _environment(pid: int) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in _read(f"/proc/{pid}/environ").decode(errors="replace").split("\0")]
    return {name: value for name, _, value in pairs}


@dataclass(frozen=True)
class _State:
    parent: int
    group: int
    dead: bool


def _state(pid: int) -> _State | None:
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return _State(int(fields[1]), int(fields[2]), fields[0] in (b"Z", b"X")) if fields else None


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # it has just ended
        return b""
