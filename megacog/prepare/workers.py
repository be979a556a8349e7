"""Decoder processes that may hang, crash or eat memory without taking the run along.

Each worker decodes one clip at a time. A worker that exceeds the time limit or dies is replaced and
its clip fails with the reason. Replies are JSON headers and raw pixels, never pickles: what comes
out of a process that has parsed hostile videos is data.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import numpy as np

from megacog.errors import EnvError
from megacog.prepare.containers import ClipError
from megacog.prepare.decode import DecodedClip, DecodeSettings, decode_clip
from megacog.runtime.processes import die_with

Decode = Callable[[str, DecodeSettings], DecodedClip]
_START_SECONDS = 120.0
_LOOKAHEAD = 4


@dataclass(frozen=True)
class WorkerLimits:
    """What one decoder process may use: seconds per clip and bytes of address space."""

    timeout: float = 60.0
    memory_bytes: int = 4 << 30


class DecodePool:
    """N decoder processes; a context manager. No process outlives it or its parent."""

    def __init__(
        self, workers: int, settings: DecodeSettings, limits: WorkerLimits, decode: Decode = decode_clip
    ) -> None:
        self._arguments = (settings, limits.memory_bytes, decode)
        self._timeout = limits.timeout
        self._count = workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> DecodePool:
        self._workers = [_Worker(*self._arguments) for _ in range(self._count)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def decode(self, videos: Iterable[str]) -> Iterator[DecodedClip | ClipError]:
        """Yields for each video, in order, its frames or the reason why there are none.

        Workers run at most a few clips ahead of the consumer.

        Raises:
            EnvError: no decoder process can be started.
        """
        source = enumerate(videos)
        window = _LOOKAHEAD * self._count
        results: dict[int, DecodedClip | ClipError] = {}
        waiting: deque[tuple[int, str]] = deque()
        following = 0
        exhausted = False
        while True:
            while following in results:
                yield results.pop(following)
                following += 1
            busy = [worker for worker in self._workers if worker.job is not None]
            outstanding = len(waiting) + len(busy) + len(results)
            while not exhausted and outstanding < window:
                item = next(source, None)
                exhausted = item is None
                if item is not None:
                    waiting.append(item)
                    outstanding += 1
            for worker in self._workers:
                if waiting and worker.job is None:
                    worker.give(*waiting.popleft(), self._timeout)
            if exhausted and not outstanding:
                return
            self._collect(results)

    def _collect(self, results: dict[int, DecodedClip | ClipError]) -> None:
        """Wait for a reply, an exit or a deadline, and record what came of it."""
        busy = [worker for worker in self._workers if worker.job is not None]
        patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        ready = wait([worker.connection for worker in busy], timeout=patience)
        for position, worker in enumerate(self._workers):
            if worker.job is None:
                continue
            index = worker.job
            if worker.connection in ready:
                result = worker.receive()
            elif time.monotonic() >= worker.deadline:
                result = worker.overdue(self._timeout)
            else:
                continue
            if result is not None:
                results[index] = result
            if not worker.alive:
                self._workers[position] = _Worker(*self._arguments)


class _Worker:
    """The parent's end of one decoder process."""

    def __init__(self, settings: DecodeSettings, memory_bytes: int, decode: Decode) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, os.getpid(), settings, memory_bytes, decode), daemon=True
        )
        self._process.start()
        theirs.close()
        self._ready = False
        self._job: tuple[int, str] | None = None
        self.alive = True
        self.deadline = float("inf")

    @property
    def job(self) -> int | None:
        """Index of the clip in hand, if any."""
        return None if self._job is None else self._job[0]

    def give(self, index: int, video: str, timeout: float) -> None:
        """Hand over a clip; the clock starts when the process is up."""
        self._job = (index, video)
        self._timeout = timeout
        if self._ready:
            self._send()
        else:
            self.deadline = time.monotonic() + _START_SECONDS

    def _send(self) -> None:
        assert self._job is not None
        self.deadline = time.monotonic() + self._timeout
        try:
            self.connection.send_bytes(self._job[1].encode("utf-8"))
        except OSError:
            pass  # It died while idle; the end of the pipe tells `receive`.

    def receive(self) -> DecodedClip | ClipError | None:
        """Returns the reply, or None after the message that the process is up.

        Raises:
            EnvError: the process could not start.
        """
        try:
            header = json.loads(self.connection.recv_bytes())
            if not self._ready:
                self._start_job(header)
                return None
            result = self._read(header)
        # ValueError, KeyError, TypeError: a process that no longer follows the protocol is as good as dead.
        except (EOFError, OSError, ValueError, KeyError, TypeError):
            self._process.join(5)
            self.kill()
            if not self._ready:
                raise EnvError(
                    f"a decoder process died while starting ({self._how_it_ended()}). Is the memory limit "
                    "(--memory-gib) too small, or PyAV damaged (`python -c 'import av'`)?"
                ) from None
            return ClipError(f"the decoder crashed on it ({self._how_it_ended()})")
        self._job = None
        return result

    def _start_job(self, header: dict[str, str]) -> None:
        if "error" in header:
            self.kill()
            raise EnvError(f"decoder processes cannot start: {header['error']}. Run `pip install av pillow`.")
        self._ready = True
        self._send()

    def _read(self, header: dict[str, Any]) -> DecodedClip | ClipError:
        if "reason" in header:
            return ClipError(str(header["reason"]))
        pixels = np.frombuffer(self.connection.recv_bytes(), dtype=np.uint8)
        return DecodedClip(pixels.reshape(header["shape"]), float(header["fps"]))

    def overdue(self, timeout: float) -> ClipError:
        """Kill the process and return the reason for its clip."""
        ready = self._ready
        self.kill()
        if not ready:
            raise EnvError(f"a decoder process did not start within {_START_SECONDS:.0f} s")
        return ClipError(f"decoding took longer than {timeout:g} s (--timeout)")

    def kill(self) -> None:
        """End the process now."""
        self.alive = False
        self._job = None
        self._process.kill()
        self._process.join()
        self.connection.close()

    def _how_it_ended(self) -> str:
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"


def _serve(
    connection: Connection, parent: int, settings: DecodeSettings, memory_bytes: int, decode: Decode
) -> None:
    """Main function of a decoder process: paths in, pixels or reasons out, until the pipe ends."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import av
        import PIL.Image  # noqa: F401 loaded before the memory limit
    except ImportError as error:
        _reply(connection, {"error": str(error)})
        return
    av.logging.set_level(None)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    _reply(connection, {"ready": True})
    while True:
        try:
            video = connection.recv_bytes().decode("utf-8")
        except EOFError:
            return
        try:
            clip = decode(video, settings)
        except ClipError as error:
            _reply(connection, {"reason": str(error)})
        except MemoryError:
            reason = f"decoding needs more than {limit / 2**30:g} GiB (--memory-gib), or the file is damaged"
            _reply(connection, {"reason": reason})
        # A surprise in a third-party decoder costs this clip, with its reason on record, not the run.
        except Exception as error:
            _reply(connection, {"reason": f"cannot be decoded: {type(error).__name__}: {error}"})
        else:
            _reply(connection, {"shape": clip.frames.shape, "fps": clip.fps})
            connection.send_bytes(np.ascontiguousarray(clip.frames).data.cast("B"))


def _reply(connection: Connection, header: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(header).encode())
