"""A rank's heartbeat: it says where it is, and a process beside it watches (`watcher.py`).

`beat` costs a write to shared memory, some microseconds. Ranks that are dead, silent or stuck are named, and all ranks
end with exit code 1: by a thread of their own, which works while the main thread waits in a collective, or else by the
watcher's SIGKILL.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megacog.errors import EXIT_FAULT, EnvError, MegacogError
from megacog.runtime import outcome
from megacog.runtime.log import get_logger
from megacog.runtime.pauses import Pauses
from megacog.runtime.ranks import Ranks
from megacog.runtime.watcher import GRACE, RECORD_BYTES, STACK_END, pack_beat, say

log = get_logger(__name__)

_PACKAGES = Path(__file__).resolve().parents[2]
"""Where the watcher finds megacog."""
_START_SECONDS = 60.0
_FAREWELL_SECONDS = 5.0
_LISTEN = 1.0
"""Seconds after which the thread that listens looks whether it has heard anything."""
_LOST_PEERS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "NCCL")
"""In messages of torch.distributed after another rank has gone."""

Address = tuple[str, int, str]
"""Host, port and token of rank 0's watcher."""


@dataclass(frozen=True)
class Limits:
    """Seconds without a beat that are too many.

    Attributes:
        step: In the phases of a step, and in every batch of an evaluation.
        start: In `START_PHASES`, and the first time that a phase comes: kernels are compiled, caches filled.
        slow: In `SLOW_PHASES`, which have no beats inside.
        lost: Silence of a watcher after which its machine counts as lost.
    """

    step: float = 300.0
    start: float = 1800.0
    slow: float = 3600.0
    lost: float = 8.0


START_PHASES = frozenset({"start", "meet", "build", "load"})
SLOW_PHASES = frozenset({"save", "samples", "export", "leave"})


class Watch:
    """Context manager in which this rank is watched.

    Args:
        ranks: Place of this process.
        limits: See there.
        folder: Of the run, for heartbeat.json and heartbeat.log.
    """

    def __init__(self, ranks: Ranks, limits: Limits, folder: Path) -> None:
        self.ranks, self.limits, self.folder = ranks, limits, folder
        self._memory = mmap.mmap(-1, RECORD_BYTES)
        self._count = 0
        self._step = 0
        self._phase = ""
        self._seen: set[str] = set()
        self._answer: dict[str, Any] = {}
        self._answered = threading.Event()
        self._own_error = threading.Event()
        """The verdict is that this rank's own error ends the run."""
        self._failing = False
        self._closed = False

    def __enter__(self) -> Watch:
        global _current
        record = os.memfd_create("heartbeat")
        stack = os.memfd_create("stack")
        os.ftruncate(record, RECORD_BYTES)
        self._memory = mmap.mmap(record, RECORD_BYTES)
        self._stack_file = os.fdopen(stack, "ab", buffering=0)
        # Not of all threads: a signal comes while others run, and to read their stacks then can end in a SIGSEGV.
        faulthandler.register(signal.SIGUSR2, self._stack_file, all_threads=False)
        self.beat("start", 0)
        self._channel, theirs = socket.socketpair()
        arguments = [self.ranks.rank, theirs.fileno(), record, stack, self.limits.lost, *launchers(self.ranks.source)]
        self._watcher = subprocess.Popen(
            [sys.executable, "-S", "-m", "megacog.runtime.watcher", *map(str, arguments)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(), record, stack),
            env=_environment(),
        )  # fmt: skip
        theirs.close()
        os.close(record)
        threading.Thread(target=self._listen, name="watch", daemon=True).start()
        _current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = None
        if error is None:
            self.beat("leave", self._step)
            self._send({"left": True})
        else:
            self.fail(error)
        self._closed = True
        if error is None or self.ranks.world_size == 1:
            self._channel.shutdown(socket.SHUT_WR)  # the watcher ends; else it sees to it that this process does
            with suppress(subprocess.TimeoutExpired):  # it may be writing a file of the run
                self._watcher.wait(_FAREWELL_SECONDS)
        faulthandler.unregister(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def open(self) -> Address:
        """On rank 0, when all ranks have met: where its watcher waits for theirs.

        Raises:
            EnvError: It does not answer.
        """
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        answer = self._ask({"listen": host, "world": self.ranks.world_size, "folder": str(self.folder)})
        found, port, token = answer["address"]
        return found, port, token

    def join(self, address: Address) -> None:
        """On the other ranks: bring the watchers together.

        Raises:
            EnvError: This machine cannot reach rank 0's watcher.
        """
        if self.ranks.rank == 0:
            return
        answer = self._ask({"join": address})
        if not answer["joined"]:
            raise EnvError(
                f"rank {self.ranks.rank} on {socket.gethostname()} cannot reach the watch on rank 0, "
                f"{answer['problem']}; let the nodes of a job reach each other's ports, or set watch.enabled=false"
            )

    def beat(self, phase: str, step: int) -> None:
        """The rank begins a phase of a step."""
        self._count += 1
        self._step, self._phase = step, phase
        limit = self.limits.step
        if phase in SLOW_PHASES:
            limit = self.limits.slow
        elif phase in START_PHASES:
            limit = self.limits.start
        elif phase not in self._seen:
            self._seen.add(phase)
            limit = max(self.limits.start, limit)
        self._write(limit)

    def alive(self) -> None:
        """Progress within a phase; not all ranks need to make as much of it."""
        self._write(self.limits.slow if self._phase in SLOW_PHASES else self.limits.step)

    def _write(self, limit: float) -> None:
        self._memory[:] = pack_beat(self._count, self._step, time.monotonic(), limit, self._phase)

    def fail(self, error: BaseException) -> None:
        """Tell the others of the error by which this rank ends.

        When it only says that a peer has gone, the reason is on its way: this process then ends in here, with it.
        """
        if self._failing:
            return
        self._failing = True
        origin = "bug"
        if isinstance(error, MegacogError):
            origin = "told"
        elif any(sign in str(error) for sign in _LOST_PEERS):
            origin = "peer"
        self._send({"failed": f"{type(error).__name__}: {error}".splitlines()[0][:500], "origin": origin})
        if origin == "peer" and self.ranks.world_size > 1:
            self._own_error.wait(self.limits.lost + 2 * GRACE)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self._answered.clear()
        self._send(message)
        if not self._answered.wait(_START_SECONDS):
            raise EnvError(f"the watcher of rank {self.ranks.rank} did not answer within {_START_SECONDS:.0f} s")
        return self._answer

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # the watcher has gone: the thread that listens to it acts

    def _listen(self) -> None:
        """The thread that hears the watcher, and ends this process when it must end."""
        received, heard, patience = b"", time.monotonic(), _START_SECONDS
        pauses = Pauses(_LISTEN, heard)
        while True:
            silent = not select.select([self._channel], [], [], _LISTEN)[0]
            now = time.monotonic()
            heard += pauses.look(now)  # whatever stopped this process stopped the watcher, too
            if silent:
                if now - heard > patience:
                    self._watcher.kill()  # it may be stopped
                    self._leave(f"its watcher has not answered for {patience:.0f} s")
                continue
            heard, patience = now, self.limits.lost
            try:
                data = self._channel.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                if self._closed:
                    return
                self._leave("its watcher has died")
            *lines, received = (received + data).split(b"\n")
            for line in lines:
                self._hear(json.loads(line))

    def _hear(self, message: dict[str, Any]) -> None:
        if "address" in message or "joined" in message:
            self._answer = message
            self._answered.set()
        elif "stack" in message:
            faulthandler.dump_traceback(self._stack_file, all_threads=True)
            self._stack_file.write(STACK_END)
        elif "end" in message:
            if self._failing and message["own_error"]:
                self._own_error.set()
            else:
                self._leave(message["end"])

    def _leave(self, reason: str) -> None:
        say(f"rank {self.ranks.rank}: {reason}")
        outcome.note(EXIT_FAULT, reason)
        os._exit(EXIT_FAULT)


def _environment() -> dict[str, str]:
    """For the watcher, which must not be taken for a rank."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return kept | {"PYTHONPATH": str(_PACKAGES)}


_current: Watch | None = None


def beat(phase: str, step: int) -> None:
    """The rank begins a phase of a step; nothing if it is not watched."""
    if _current is not None:
        _current.beat(phase, step)


def alive() -> None:
    """Progress within a phase, of which not every rank makes as much; nothing if this rank is not watched."""
    if _current is not None:
        _current.alive()


def launchers(source: str) -> list[int]:
    """Process ids of the programs that have started this rank, and without which it would be an orphan.

    Args:
        source: As `Ranks.source`. A process that no launcher has started may outlive the shell that it came from.
    """
    supervisor = outcome.supervisor()
    supervisors = [] if supervisor is None else [supervisor]
    if source in ("single process", "environment"):
        return supervisors
    parent = os.getppid()
    found = [parent]
    if source == "deepspeed":  # launch.py is a child of the `deepspeed` command, or of sshd and a shell
        pid = _parent_of(parent)
        while pid > 1:
            found.append(pid)
            name = _command(pid)
            if "deepspeed" in name or "sshd" in name:
                break
            pid = _parent_of(pid)
        else:
            found = [parent]
    return [pid for pid in found if pid > 1] + supervisors


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
