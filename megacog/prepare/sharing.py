"""Slices of the input handed out to whoever is free: to one process, or to the ranks of a job.

A rank takes a slice when its decoders run out of videos, so fast ranks take more: nothing is dealt out beforehand. A
slice becomes one shard whoever makes it, hence the result does not depend on the number of ranks. Rank 0 alone keeps
the books: the others send it what they have counted and finished. It answers them in a thread, so that nobody waits
while it codes, and makes slices like the others.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megacog.errors import EnvError
from megacog.prepare.meter import Meter
from megacog.prepare.sources import Row
from megacog.prepare.state import Part, SliceRecord

Message = Mapping[str, Any]
"""What JSON can say."""
_POLL_SECONDS = 0.005
_COUNT_SECONDS = 1.0


@dataclass(frozen=True)
class Slice:
    """Consecutive rows of a part that make one shard.

    Attributes:
        number: its place among all slices of the preparation.
        part: that it belongs to.
        index: its place in the part.
        rows: one or more.
    """

    number: int
    part: Part
    index: int
    rows: Sequence[Row]

    def message(self) -> Message:
        """Returns all of it."""
        return {
            "number": self.number, "stem": str(self.part.stem), "num_slices": self.part.num_slices, "index": self.index,
            "rows": [asdict(row) for row in self.rows],
        }  # fmt: skip

    @staticmethod
    def of(message: Message) -> Slice:
        """Returns what `message` has described."""
        part = Part(Path(message["stem"]), message["num_slices"])
        return Slice(message["number"], part, message["index"], [Row(**row) for row in message["rows"]])


class Work(Protocol):
    """What a rank that makes slices has to do with the others."""

    def take(self) -> Slice | None:
        """Returns the next slice; it is the caller's now. None when there is none left."""

    def finish(self, piece: Slice, record: SliceRecord) -> None:
        """Says that a slice and its shard are complete."""

    def count(self, ok: int, failed: int, frames: int) -> None:
        """Says how many clips, and frames in them, have been made since the last time."""


class Channel(Protocol):
    """Carries messages between rank 0 and the other ranks, in order between any two."""

    size: int

    def send(self, rank: int, message: Message) -> None:
        """Sends a message to a rank."""

    def arrived(self) -> Iterator[tuple[int, Message]]:
        """Yields (sender, message) of everything that has arrived, without waiting for more."""


class LocalWork:
    """The slices that are to be made, and what is kept of them; safe to use from several threads."""

    def __init__(self, slices: Sequence[Slice], meter: Meter, keep: Callable[[Slice, SliceRecord], None]) -> None:
        """Args:
        slices: in the order in which they are handed out.
        meter: shows progress.
        keep: is called with every finished slice, by one thread at a time.
        """
        self._waiting = deque(slices)
        self._unfinished = len(slices)
        self._meter, self._keep = meter, keep
        self._changed = threading.Condition()

    def take(self) -> Slice | None:
        """See `Work`."""
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def finish(self, piece: Slice, record: SliceRecord) -> None:
        """See `Work`."""
        with self._changed:
            self._keep(piece, record)
            self._unfinished -= 1
            self._changed.notify_all()

    def count(self, ok: int, failed: int, frames: int) -> None:
        """See `Work`."""
        with self._changed:
            self._meter.add(ok, failed, frames)

    def wait(self) -> None:
        """Waits until all slices are finished, by whomever."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unfinished)


class Desk:
    """Rank 0's answers to the other ranks; a context manager.

    It ends when every other rank has been told that all is done. After an error it ends at once and tells nobody: the
    job is to be aborted.
    """

    def __init__(self, channel: Channel, alarm: Callable[[BaseException], object], depends: Message) -> None:
        """Args:
        channel: to the other ranks.
        alarm: is called with an error of the answering thread; it must end the job.
        depends: what the shards' bytes depend on here; it must be the same on all ranks.
        """
        self._channel, self._alarm, self._depends = channel, alarm, _plain(depends)
        self._work: LocalWork | None = None
        self._slices: Mapping[int, Slice] = {}
        self._done = self._broken = False
        self._thread = threading.Thread(target=self._run, name="desk", daemon=True)

    @property
    def ranks(self) -> int:
        """All ranks of the job."""
        return self._channel.size

    def open(self, work: LocalWork, slices: Sequence[Slice]) -> None:
        """From now on others get slices of this work."""
        self._slices = {piece.number: piece for piece in slices}
        self._work = work

    def __enter__(self) -> Desk:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done, self._broken = error is None, error is not None
        self._thread.join()

    def _run(self) -> None:
        try:
            self._answer()
        except BaseException as error:
            self._alarm(error)

    def _answer(self) -> None:
        asking: set[int] = set()
        leaving: set[int] = set()
        while len(leaving) < self._channel.size - 1 or not self._done:
            if self._broken:
                return
            for rank, message in self._channel.arrived():
                self._note(message)
                if "ask" in message:
                    (leaving if message["ask"] == "leave" else asking).add(rank)
            # Before the work is known, and for ever if there was nothing to do, askers wait.
            if self._work is not None or self._done:
                for rank in sorted(asking):
                    piece = self._work.take() if self._work is not None else None
                    self._channel.send(rank, {"slice": None if piece is None else piece.message()})
                asking.clear()
            time.sleep(_POLL_SECONDS)
        for rank in sorted(leaving):
            self._channel.send(rank, {"done": True})

    def _note(self, message: Message) -> None:
        if "hello" in message:
            self._require_agreement(*message["hello"])
        if self._work is None:
            return
        if "counts" in message:
            self._work.count(*message["counts"])
        if "finished" in message:
            self._work.finish(self._slices[message["finished"]], SliceRecord.of(message["record"]))


    def _require_agreement(self, name: str, depends: Message) -> None:
        """Raises:
        EnvError: the other rank would make other shards.
        """
        keys = [key for key in self._depends if self._depends[key] != depends[key]]
        if keys:
            differences = "; ".join(f"{key}: {self._depends[key]} here, {depends[key]} there" for key in keys)
            raise EnvError(
                f"{name} would make other shards ({differences}). Give all ranks the same environment, files and "
                "command line."
            )


class RemoteWork:
    """The same work as seen by the other ranks."""

    def __init__(self, channel: Channel, name: str, depends: Message) -> None:
        """Args:
        channel: to rank 0.
        name: what to call this rank in messages.
        depends: see `Desk`.
        """
        self._channel = channel
        channel.send(0, {"hello": [name, _plain(depends)]})
        self._counts = [0, 0, 0]
        self._last = time.monotonic()

    def take(self) -> Slice | None:
        """See `Work`."""
        self._channel.send(0, {"ask": "slice"})
        piece = self._reply()["slice"]
        return None if piece is None else Slice.of(piece)

    def finish(self, piece: Slice, record: SliceRecord) -> None:
        """See `Work`."""
        self._flush()
        self._channel.send(0, {"finished": piece.number, "record": asdict(record)})

    def count(self, ok: int, failed: int, frames: int) -> None:
        """See `Work`; rank 0 hears of it once a second."""
        self._counts = [old + new for old, new in zip(self._counts, (ok, failed, frames), strict=True)]
        if time.monotonic() - self._last >= _COUNT_SECONDS:
            self._flush()

    def leave(self) -> None:
        """Waits until rank 0 has finished everything."""
        self._channel.send(0, {"ask": "leave"})
        self._reply()

    def _flush(self) -> None:
        self._last = time.monotonic()
        if any(self._counts):
            self._channel.send(0, {"counts": self._counts})
            self._counts = [0, 0, 0]

    def _reply(self) -> Message:
        while True:
            for _, message in self._channel.arrived():
                return message
            time.sleep(_POLL_SECONDS)


def _plain(values: Message) -> Message:
    """Returns values as they are after a journey as JSON."""
    return json.loads(json.dumps(values))
