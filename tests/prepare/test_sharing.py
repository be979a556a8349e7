"""Slices handed out to ranks; here every rank is a thread, and messages go through queues as JSON."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_decoders import misbehave
from tiny_videos import random_tokenizer, write_captions

from megacog.errors import EnvError
from megacog.prepare import sharing
from megacog.prepare.decode import DecodeSettings
from megacog.prepare.meter import Meter
from megacog.prepare.pipeline import PrepareSettings, assist, prepare
from megacog.prepare.sharing import Desk, LocalWork, RemoteWork, Slice, Work
from megacog.prepare.sources import Failure, Row, read_source
from megacog.prepare.state import Part, SliceRecord
from megacog.tokenizers.frames import load_frame_tokenizer

SHARDS = {"grid": (4, 4), "decoder": "PyAV 18"}
RECORD = SliceRecord(1, 2, 0.25, 3, "abc", [Failure(7, "b\udcff.mp4", "gone")])


class Post:
    """Messages between the threads of a test."""

    def __init__(self, size: int) -> None:
        self.inboxes: list[queue.Queue[tuple[int, str]]] = [queue.Queue() for _ in range(size)]

    def channel(self, rank: int) -> ThreadChannel:
        return ThreadChannel(self, rank)


class ThreadChannel:
    def __init__(self, post: Post, rank: int) -> None:
        self._post, self._rank, self.size = post, rank, len(post.inboxes)

    def send(self, rank: int, message: Any) -> None:
        self._post.inboxes[rank].put((self._rank, json.dumps(message)))

    def arrived(self) -> Iterator[tuple[int, Any]]:
        while True:
            try:
                sender, text = self._post.inboxes[self._rank].get_nowait()
            except queue.Empty:
                return
            yield sender, json.loads(text)


def some_slices(count: int) -> list[Slice]:
    part = Part(Path("shards/clips"), count)
    return [Slice(k, part, k, [Row(k + 2, f"v{k}\udcff.mp4", f"caption {k}")]) for k in range(count)]


def make_all(work: Work, seconds: float) -> list[int]:
    """Numbers of the slices that a rank has made that needs so long for each."""
    made = []
    while (piece := work.take()) is not None:
        time.sleep(seconds)
        work.count(1, 0, 5)
        work.finish(piece, RECORD)
        made.append(piece.number)
    return made


def run_ranks(slices: list[Slice], seconds: list[float]) -> tuple[list[list[int]], list[tuple[Slice, Any]], Meter]:
    """What each rank has made, what rank 0 has kept, and its meter; `seconds` per slice, one number per rank."""
    post, meter = Post(len(seconds)), Meter(len(slices))
    made: list[list[int]] = [[] for _ in seconds]
    kept: list[tuple[Slice, Any]] = []

    def helper(rank: int) -> None:
        work = RemoteWork(post.channel(rank), "rank rank", SHARDS)
        made[rank] = make_all(work, seconds[rank])
        work.leave()

    threads = [threading.Thread(target=helper, args=(rank,)) for rank in range(1, len(seconds))]
    for thread in threads:
        thread.start()
    with Desk(post.channel(0), pytest.fail, SHARDS) as desk:
        work = LocalWork(slices, meter, lambda piece, record: kept.append((piece, record)))
        desk.open(work, slices)
        made[0] = make_all(work, seconds[0])
        work.wait()
        assert len(kept) == len(slices)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    return made, kept, meter


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_slice_is_made_once_and_kept_with_its_record(size: int) -> None:
    slices = some_slices(20)
    made, kept, meter = run_ranks(slices, [0.001] * size)
    assert Counter(number for numbers in made for number in numbers) == Counter(range(20))
    assert sorted(piece.number for piece, _ in kept) == list(range(20))
    assert all(record == RECORD and piece is slices[piece.number] for piece, record in kept)
    assert (meter.ok, meter.failed, meter.frames) == (20, 0, 100)


def test_a_fast_rank_makes_more_and_nobody_waits_for_a_slow_one() -> None:
    made, _, _ = run_ranks(some_slices(24), [0.2, 0.01, 0.2])
    assert len(made[1]) >= 12, "a static split would have given it 8"


def test_a_slow_rank_0_keeps_nobody_waiting() -> None:
    made, _, _ = run_ranks(some_slices(24), [0.4, 0.005, 0.005])
    assert len(made[0]) <= 3


def test_more_ranks_than_slices_come_to_an_end() -> None:
    made, _, _ = run_ranks(some_slices(1), [0.0] * 4)
    assert sum(map(len, made)) == 1


def test_helpers_leave_only_when_rank_0_is_done_even_if_there_was_nothing_to_do() -> None:
    post = Post(2)
    left = threading.Event()

    def helper() -> None:
        work = RemoteWork(post.channel(1), "rank 1", SHARDS)
        assert work.take() is None
        work.leave()
        left.set()

    thread = threading.Thread(target=helper)
    thread.start()
    with Desk(post.channel(0), pytest.fail, SHARDS):
        assert not left.wait(0.2)
    assert left.wait(5)


def test_progress_of_other_ranks_arrives_before_their_slices_are_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_COUNT_SECONDS", 0.0)
    post, meter, slices = Post(2), Meter(10), some_slices(1)
    with Desk(post.channel(0), pytest.fail, SHARDS) as desk:
        desk.open(LocalWork(slices, meter, lambda *_: None), slices)
        work = RemoteWork(post.channel(1), "rank 1", SHARDS)
        piece = work.take()
        assert piece == slices[0], "nothing is lost on the way, surrogates included"
        work.count(3, 1, 40)
        deadline = time.monotonic() + 5
        while meter.frames == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (meter.ok, meter.failed, meter.frames) == (3, 1, 40)
        work.finish(piece, RECORD)
        leaving = threading.Thread(target=work.leave)
        leaving.start()
    leaving.join(5)
    assert not leaving.is_alive()


def test_an_error_while_keeping_a_slice_of_another_rank_raises_the_alarm() -> None:
    post, slices, errors = Post(2), some_slices(1), queue.Queue()

    def full(*_: object) -> None:
        raise EnvError("disk full")

    desk = Desk(post.channel(0), errors.put, SHARDS)
    with pytest.raises(EnvError), desk:
        desk.open(LocalWork(slices, Meter(1), full), slices)
        work = RemoteWork(post.channel(1), "rank 1", SHARDS)
        piece = work.take()
        assert piece is not None
        work.finish(piece, RECORD)
        raise errors.get(timeout=5)


def test_a_rank_that_would_make_other_shards_raises_the_alarm() -> None:
    post, errors = Post(2), queue.Queue()
    with pytest.raises(EnvError, match="rank 1 would make other shards .decoder: PyAV 18 here, PyAV 17 there"):
        with Desk(post.channel(0), errors.put, SHARDS):
            RemoteWork(post.channel(1), "rank 1", {"grid": [4, 4], "decoder": "PyAV 17"})
            raise errors.get(timeout=5)


def test_an_error_of_rank_0_does_not_wait_for_the_others() -> None:
    with pytest.raises(EnvError, match="disk full"), Desk(Post(3).channel(0), pytest.fail, SHARDS):
        raise EnvError("disk full")


def prepared(root: Path, out: Path, ranks: int) -> dict[str, bytes]:
    """The files that so many ranks make of the rows in root."""
    settings = PrepareSettings(out, DecodeSettings(8.0, 16, 16, str(root)), clips_per_shard=3)
    tokenizer, source, post = load_frame_tokenizer(root / "tokenizer"), read_source(root / "c.csv"), Post(ranks)

    def helper(rank: int) -> None:
        assist(RemoteWork(post.channel(rank), "rank rank", SHARDS), tokenizer, settings, misbehave)

    threads = [threading.Thread(target=helper, args=(rank,)) for rank in range(1, ranks)]
    for thread in threads:
        thread.start()
    desk = Desk(post.channel(0), pytest.fail, SHARDS) if ranks > 1 else None
    summary = prepare(source, tokenizer, settings, misbehave, desk)
    for thread in threads:
        thread.join(30)
    assert (summary.clips, summary.failed) == (13, 3)
    return {path.name: path.read_bytes() for path in out.parent.iterdir()}


@pytest.mark.distributed
def test_three_ranks_make_the_bytes_of_one_and_one_list_of_failures(tmp_path: Path) -> None:
    random_tokenizer(tmp_path / "tokenizer")
    rows = [(f"slow{k}", f"clip {k}") for k in range(13)]
    rows[4:4] = [("refuse", "no"), ("bug", "no"), ("exit", "no")]
    write_captions(tmp_path / "c.csv", rows)
    alone = prepared(tmp_path, tmp_path / "alone/clips", 1)
    assert prepared(tmp_path, tmp_path / "three/clips", 3) == alone
    assert len(alone) == 6 + 2 and alone["failed.jsonl"].count(b"\n") == 3


@pytest.mark.distributed
def test_a_rank_that_sees_another_folder_than_rank_0_is_an_error(tmp_path: Path) -> None:
    random_tokenizer(tmp_path / "tokenizer")
    settings = PrepareSettings(tmp_path / "elsewhere/clips", DecodeSettings(8.0, 16, 16, str(tmp_path)))
    post, slices = Post(2), some_slices(1)
    with pytest.raises(EnvError, match="rank 0 has just written.*a file system that all nodes share"):
        with Desk(post.channel(0), pytest.fail, SHARDS) as desk:
            desk.open(LocalWork(slices, Meter(1), lambda *_: None), slices)
            work = RemoteWork(post.channel(1), "rank 1", SHARDS)
            assist(work, load_frame_tokenizer(tmp_path / "tokenizer"), settings, misbehave)
