"""The process beside every rank that watches it: `python -m megacog.runtime.watcher`, started by `heartbeat.Watch`.

It sees its rank die (their socket ends), stand still (the beats in shared memory), stop (/proc) and lose its launcher,
also while the rank is in a collective, in native code or stopped. The watcher of rank 0 is the hub: every other one
holds one connection to it, on which it tells every second what its rank does, and hears the hub in return. So N ranks
are N connections and 2 N small messages a second, without files on a shared disk.

Standard library only, and nothing that can wait for a disk: it must start fast, stay small, and never hang itself.
"""

from __future__ import annotations

import hmac
import json
import mmap
import os
import secrets
import selectors
import signal
import socket
import struct
import sys
import time
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megacog.runtime.hub import TICK, Beat, Hub, Verdict
from megacog.runtime.hub_status import StatusFile
from megacog.runtime.pauses import Pauses

_BEAT = struct.Struct("<Qqdd16s")
"""count, step, monotonic time of the last progress, limit in seconds, phase."""
_CHECKSUM = struct.Struct("<L")
RECORD_BYTES = _BEAT.size + _CHECKSUM.size
STACK_END = b"(end of the stack)\n"
"""After a stack that is not cut short."""
GRACE = 3.0
"""Seconds that a rank has to end by itself, before it is killed."""
_PATIENCE = 20.0
"""The same for a rank that ends by an error of its own."""
_TELL = 1.0
"""Seconds between two messages of a watcher."""
_STACK_SECONDS = 1.5
_CONNECT_SECONDS = 30.0
_LONGEST_LINE = 1 << 17
_LONGEST_STACK = 1 << 15
_QUIET = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def pack_beat(count: int, step: int, moment: float, limit: float, phase: str) -> bytes:
    """A beat with its checksum, RECORD_BYTES bytes: a reader notices when it is being written."""
    beat = _BEAT.pack(count, step, moment, limit, phase.encode())
    return beat + _CHECKSUM.pack(zlib.crc32(beat))


class Line:
    """A socket that carries one JSON object per line, in both directions, without waiting."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.rank: int | None = None
        """Who is at the other end, once it has said so."""
        self.open = True
        connection.setblocking(False)
        self._read, self._unsent = b"", b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Hand a message over; what the other end does not take now goes with the next one."""
        self._unsent += json.dumps(message).encode() + b"\n"
        try:
            self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            self.open = len(self._unsent) < _LONGEST_LINE
        except OSError:
            self.open = False

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come; `open` is false afterwards when nothing will come any more."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        *lines, self._read = (self._read + data).split(b"\n")
        self.open &= bool(data) and len(self._read) < _LONGEST_LINE
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if not all(isinstance(message, dict) for message in messages):
            self.open = False
            return []
        return messages


class Watcher:
    """Watches one rank; on rank 0 also the hub of all.

    Args:
        rank: Of the process that started this one.
        channel: To that process.
        record: Its beat, shared memory of RECORD_BYTES bytes.
        stack: File descriptor to which faulthandler writes that process's stacks, asked by the channel or by SIGUSR2.
        launchers: Processes without which the rank shall save and leave, e.g. the one that has started it.
        lost_seconds: Silence after which a watcher is lost.
    """

    def __init__(
        self, rank: int, channel: socket.socket, record: memoryview, stack: int, launchers: list[int],
        lost_seconds: float,
    ) -> None:  # fmt: skip
        self.rank, self.pid, self.host = rank, os.getppid(), socket.gethostname()
        self._rank_line = Line(channel)
        self._record, self._stack = record, stack
        self._launchers = {pid: start for pid in launchers if (start := _start_time(pid)) is not None}
        self._lost_seconds = lost_seconds
        now = time.monotonic()
        self._hub = Hub(1, lost_seconds, now)  # of this rank alone, until all have met
        self._hub.join(rank, self.host, self.pid, now)
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ, self._rank_line)
        self._server: socket.socket | None = None
        self._token = ""
        self._peers: dict[int, Line] = {}
        """On rank 0, by rank."""
        self._central: Line | None = None
        """On the other ranks: the connection to rank 0's watcher."""
        self._heard = now
        """When the hub was heard last."""
        self._told = 0.0
        self._pauses = Pauses(TICK, now)
        self._leaving = False
        self._ended: float | None = None
        """Since when the rank is told to end."""
        self._patience = GRACE
        self._stacks: dict[int, str] = {}
        self._status: StatusFile | None = None

    def run(self) -> None:
        """Until the rank has gone, and with it all reason to stay."""
        while self._rank_line.open or (self._hosting and not self._done):
            for key, _ in self._selector.select(TICK / 2):
                self._serve(key.data)
            now = time.monotonic()
            if now - self._pauses.looked >= TICK:
                self._look(now)
        for line in self._peers.values():
            line.send({"closing": True})
        if self._status is not None:
            self._status.close()

    # What comes in

    def _serve(self, line: Line | None) -> None:
        if line is None:
            self._accept()
            return
        messages = line.receive()
        for message in messages:
            if line is self._rank_line:
                self._from_rank(message)
            elif line is self._central:
                self._from_hub(message)
            else:
                self._from_peer(line, message)
        if not line.open:
            self._closed(line)

    def _accept(self) -> None:
        assert self._server is not None
        try:
            connection, _ = self._server.accept()
        except OSError:  # whoever came has gone again
            return
        self._selector.register(connection, selectors.EVENT_READ, Line(connection))

    def _closed(self, line: Line) -> None:
        self._selector.unregister(line.socket)
        line.socket.close()
        if line is self._rank_line:
            self._rank_gone()
        elif line is self._central:
            self._central = None
            if not self._leaving:
                self._end("rank 0's watcher has died, with its machine or alone. The run ends")
        elif line.rank is not None:
            self._peers.pop(line.rank, None)
            self._hub.die(line.rank, time.monotonic())

    def _rank_gone(self) -> None:
        beat = self._beat(time.monotonic())
        self._pass_on({"gone": True} | ({"beat": _plain(beat)} if beat is not None else {}))

    def _from_rank(self, message: dict[str, Any]) -> None:
        if "listen" in message:
            self._rank_line.send(self._listen(message["listen"], message["world"], message["folder"]))
        elif "join" in message:
            self._rank_line.send(self._join(*message["join"]))
        elif "left" in message:
            self._leaving = True
            self._pass_on(message)
        elif "failed" in message:
            self._pass_on(message)

    def _pass_on(self, message: dict[str, Any]) -> None:
        """Tell the hub, here or on rank 0, something about this rank."""
        if self._central is not None:
            self._central.send(message)
        self._take(self.rank, message)

    def _from_hub(self, message: dict[str, Any]) -> None:
        self._heard = time.monotonic()
        if "stack" in message:
            assert self._central is not None
            self._central.send({"stack": self.stack()})
        elif "end" in message:
            self._end(message["end"], message["failed"])
        elif "closing" in message:
            self._leaving = True

    def _from_peer(self, line: Line, message: dict[str, Any]) -> None:
        now = time.monotonic()
        if line.rank is None:
            if not hmac.compare_digest(str(message.get("token")), self._token):
                line.open = False
                return
            line.rank = int(message["rank"])
            self._peers[line.rank] = line
            self._hub.join(line.rank, str(message["host"]), int(message["pid"]), now)
            line.send({"welcome": True})
        else:
            self._take(line.rank, message)

    def _take(self, rank: int, message: dict[str, Any]) -> None:
        """What a watcher tells of its rank."""
        now = time.monotonic()
        self._hub.hear(rank, now, Beat(*message["beat"]) if "beat" in message else None)
        if "left" in message:
            self._hub.leave(rank)
        elif "failed" in message:
            self._hub.fail(rank, message["failed"], message["origin"], now)
        elif "gone" in message:
            self._hub.die(rank, now)
        elif "stack" in message:
            self._stacks[rank] = message["stack"]

    # Meeting

    def _listen(self, host: str, world_size: int, folder: str) -> dict[str, Any]:
        """Become the hub; what the others need to come here."""
        try:
            family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            self._server = socket.create_server(address[:2], family=family, backlog=world_size)
        except OSError:  # the name by which others know this machine may belong to a router
            self._server = socket.create_server(("", 0), backlog=world_size)
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ, None)
        self._token = secrets.token_hex(16)
        now = time.monotonic()
        self._hub = Hub(world_size, self._lost_seconds, now)
        self._hub.join(self.rank, self.host, self.pid, now)
        self._status = StatusFile(Path(folder), self._hub)
        return {"address": [host, self._server.getsockname()[1], self._token]}

    def _join(self, host: str, port: int, token: str) -> dict[str, Any]:
        try:
            connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
        except OSError as error:
            return {"joined": False, "problem": f"{host}:{port}: {error}"}
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._central = Line(connection)
        self._central.send({"token": token, "rank": self.rank, "host": self.host, "pid": self.pid})
        self._selector.register(connection, selectors.EVENT_READ, self._central)
        self._heard = time.monotonic()
        return {"joined": True}

    # What is seen

    def _look(self, now: float) -> None:
        pause = self._pauses.look(now)
        if pause > self._lost_seconds / 2:
            self._heard = now  # rank 0's machine may be continued a little later than this one
        self._look_for_launchers()
        if self._ended is not None:
            self._kill_if_still_there(now)
            return
        beat = self._beat(now)
        if beat is not None:
            self._hub.hear(self.rank, now, beat)
        if now - self._told >= _TELL:
            self._told = now
            self._tell(beat)
        if self._central is None:
            verdict = self._hub.verdict(now)
            if verdict is not None:
                self._judge(verdict)
        elif now - self._heard > self._lost_seconds and not self._leaving:
            seconds = now - self._heard
            self._end(f"nothing was heard from rank 0's watcher for {seconds:.0f} s: it is lost. The run ends")
        if self._status is not None:
            self._status.write(now)

    def _tell(self, beat: Beat | None) -> None:
        """That this process is there, and what its rank does."""
        self._rank_line.send({"ping": True})
        for line in self._peers.values():
            line.send({"ping": True})
        if self._central is not None and beat is not None:
            self._central.send({"beat": _plain(beat)})

    def _beat(self, now: float) -> Beat | None:
        """What the rank does; None while it is being written."""
        record = bytes(self._record)
        beat = record[: _BEAT.size]
        if record[_BEAT.size :] != _CHECKSUM.pack(zlib.crc32(beat)):
            return None
        count, step, moment, limit, phase = _BEAT.unpack(beat)
        age = max(0.0, now - moment - self._pauses.since(moment))  # a suspended run is not stuck
        return Beat(count, step, phase.rstrip(b"\0").decode(), limit, age, _state(self.pid))

    def _look_for_launchers(self) -> None:
        """A rank without its launcher is one that nobody can stop or sees fail: it shall save and leave."""
        gone = [pid for pid, start in self._launchers.items() if _start_time(pid) != start]
        if gone and self._rank_is_parent():
            say(f"rank {self.rank}: its launcher (process {gone[0]}) has died; the run saves and stops")
            os.kill(self.pid, signal.SIGTERM)
            self._launchers.clear()

    def stack(self) -> str:
        """What the rank is doing, by faulthandler; a stopped process has to run for it.

        The thread that listens to this watcher is asked for it, since only who holds python's lock can read the stacks
        of threads that run. Where none lets go of that lock, a signal shows the main thread's.
        """
        before = os.fstat(self._stack).st_size
        if not self._rank_is_parent():
            return ""
        if _state(self.pid) == "T":
            os.kill(self.pid, signal.SIGCONT)
        self._rank_line.send({"stack": True})
        if not self._stack_comes(before, STACK_END):
            os.kill(self.pid, signal.SIGUSR2)
            self._stack_comes(before)
        text = os.pread(self._stack, _LONGEST_STACK, before).replace(STACK_END, b"")
        return _without_watch(text.decode(errors="replace"))

    def _stack_comes(self, before: int, end: bytes = b"") -> bool:
        """Wait until a stack stands in the file, up to its end or, if that has no mark, until the file grows no more.

        Returns:
            Whether it has come in time.
        """
        deadline, size = time.monotonic() + _STACK_SECONDS, before
        while time.monotonic() < deadline:
            time.sleep(0.05)
            size, last = os.fstat(self._stack).st_size, size
            last_bytes = os.pread(self._stack, len(end), max(before, size - len(end)))
            if size > before and (last_bytes == end if end else size == last):
                return True
        return False

    def _rank_is_parent(self) -> bool:
        """Whether the process id is still the rank's."""
        return os.getppid() == self.pid

    # The end

    @property
    def _hosting(self) -> bool:
        return self._server is not None

    @property
    def _done(self) -> bool:
        """Of the hub: nobody needs it."""
        if self._ended is not None:
            return not self._peers or time.monotonic() - self._ended > self._patience
        return self._hub.members[self.rank].left

    def _judge(self, verdict: Verdict) -> None:
        """The run ends: say why, with stacks, and tell all ranks."""
        everybody_failed = verdict.kind == "failed" and all(
            member.failed is not None for member in self._hub.members.values()
        )
        if everybody_failed and len(verdict.ranks) == self._hub.world_size:  # each tells it itself
            self._ended, self._patience = time.monotonic(), _PATIENCE
            return
        if verdict.kind == "stuck":
            self._gather_stacks(verdict)
        reason = f"{verdict.reason}. The run ends"
        say(f"WATCH: {reason} with exit code 1")
        for text, ranks in _same(self._stacks).items():
            say(f"WATCH: stack of rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}:\n{text.rstrip()}")
        for line in list(self._peers.values()):
            line.send({"end": reason, "failed": verdict.ranks if verdict.kind == "failed" else []})
        self._end(reason, verdict.ranks if verdict.kind == "failed" else ())
        if self._status is not None:
            self._status.report(reason, self._stacks)

    def _gather_stacks(self, verdict: Verdict) -> None:
        asked = set(verdict.ranks[:16])
        for rank in asked - {self.rank}:
            if rank in self._peers:
                self._peers[rank].send({"stack": True})
        if self.rank in asked:
            self._stacks[self.rank] = self.stack()
        deadline = time.monotonic() + 3 * _STACK_SECONDS
        while asked - self._stacks.keys() and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.1):
                self._serve(key.data)

    def _end(self, reason: str, failed: Collection[int] = ()) -> None:
        """Ask the rank to leave with exit code 1; `_kill_if_still_there` sees to it.

        Args:
            reason: What it shall say.
            failed: Ranks that end by an error of their own, which they shall tell themselves.
        """
        if self._ended is None:
            self._ended = time.monotonic()
            own_error = self.rank in failed
            self._patience = _PATIENCE if own_error else GRACE
            self._rank_line.send({"end": reason, "own_error": own_error})

    def _kill_if_still_there(self, now: float) -> None:
        assert self._ended is not None
        if self._rank_line.open and now - self._ended > self._patience and self._rank_is_parent():
            say(f"rank {self.rank}: killed, since it does not end by itself")
            os.kill(self.pid, signal.SIGKILL)


def _same(stacks: Mapping[int, str]) -> dict[str, list[int]]:
    """Ranks by stack: in a hang most have the same."""
    found: dict[str, list[int]] = {}
    for rank, text in sorted(stacks.items()):
        found.setdefault(text or "(it gave none)", []).append(rank)
    return found


def _without_watch(stack: str) -> str:
    """A stack by faulthandler without the thread that listens to the watcher."""
    threads = stack.split("\n\n")
    return "\n\n".join(thread for thread in threads if "heartbeat.py" not in thread or "in _listen" not in thread)


def _plain(beat: Beat) -> list[Any]:
    return list(vars(beat).values())


def say(text: str) -> None:
    """One write to stderr, whatever its state."""
    try:
        os.write(2, f"{time.strftime('%H:%M:%S')} {text}\n".encode())
    except OSError:
        pass


def _state(pid: int) -> str:
    fields = _stat(pid)
    return fields[0] if fields else "Z"


def _start_time(pid: int) -> str | None:
    """When a process started; another process with the same id has another one. None when there is none."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in "ZX" else None


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def main(argv: list[str]) -> None:
    """Arguments: rank, descriptors of channel, record and stack, seconds, process ids of launchers."""
    for number in _QUIET:
        signal.signal(number, signal.SIG_IGN)
    rank, channel, record, stack = (int(word) for word in argv[:4])
    memory = mmap.mmap(record, RECORD_BYTES, prot=mmap.PROT_READ)
    watcher = Watcher(
        rank, socket.socket(fileno=channel), memoryview(memory), stack, [int(word) for word in argv[5:]],
        float(argv[4]),
    )  # fmt: skip
    watcher.run()


if __name__ == "__main__":
    main(sys.argv[1:])
