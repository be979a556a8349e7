from __future__ import annotations

import os
import sys
import time
import types
from pathlib import Path

import pytest
from fake_decoders import misbehave

from megacog.errors import EnvError
from megacog.prepare.containers import ClipError
from megacog.prepare.decode import DecodedClip, DecodeSettings
from megacog.prepare.workers import DecodePool, WorkerLimits

pytestmark = pytest.mark.distributed
SETTINGS = DecodeSettings(fps=8.0, height=4, width=4, root="/")


def _describe(result: DecodedClip | ClipError) -> int | str:
    return str(result) if isinstance(result, ClipError) else int(result.frames[0, 0, 0, 0])


def test_every_way_to_fail_costs_one_clip_and_keeps_the_order() -> None:
    videos = ["slow1", "2", "hang", "abort", "5", "exit", "refuse", "bug", "eat", "slow10", "11"]
    with DecodePool(2, SETTINGS, WorkerLimits(timeout=3.0, memory_bytes=2 << 30), misbehave) as pool:
        results = [_describe(result) for result in pool.decode(videos)]
    assert [result for result in results if isinstance(result, int)] == [1, 2, 5, 10, 11]
    reasons = dict(zip(videos, results, strict=True))
    assert reasons["hang"] == "decoding took longer than 3 s (--timeout)"
    assert reasons["abort"] == "the decoder crashed on it (signal SIGABRT)"
    assert reasons["exit"] == "the decoder crashed on it (exit code 7)"
    assert reasons["refuse"] == "not today"
    assert reasons["bug"] == "cannot be decoded: KeyError: 'surprise'"
    assert "more than 2 GiB (--memory-gib)" in str(reasons["eat"])


def test_a_slow_consumer_does_not_make_clips_late() -> None:
    taken: list[int | str] = []
    with DecodePool(1, SETTINGS, WorkerLimits(timeout=1.5), misbehave) as pool:
        for result in pool.decode(["1", "2", "3"]):
            taken.append(_describe(result))
            time.sleep(2.0 if len(taken) == 1 else 0.0)
    assert taken == [1, 2, 3]


def test_workers_end_with_the_pool_and_run_a_few_clips_ahead_at_most() -> None:
    asked: list[str] = []

    def videos():
        for k in range(100):
            asked.append(str(k))
            yield str(k)

    with DecodePool(1, SETTINGS, WorkerLimits(), misbehave) as pool:
        stream = pool.decode(videos())
        assert _describe(next(stream)) == 0
        processes = [worker._process.pid for worker in pool._workers]
        assert len(asked) <= 5
    for pid in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_decoders_that_cannot_start_are_an_error_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(video: str, settings: DecodeSettings) -> DecodedClip:
        raise AssertionError

    # The decoder process cannot import this, so it dies before it is ready.
    module = types.ModuleType("module_of_this_process")
    decode.__module__, decode.__qualname__ = module.__name__, "decode"
    module.decode = decode
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(EnvError, match="died while starting .exit code 1"):
        with DecodePool(1, SETTINGS, WorkerLimits(), decode) as pool:
            list(pool.decode(["1", "2"]))


def test_too_little_memory_is_named_as_the_reason(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"x")
    settings = DecodeSettings(fps=8.0, height=4, width=4, root=str(tmp_path))
    with DecodePool(1, settings, WorkerLimits(memory_bytes=1 << 20), misbehave) as pool:
        assert "--memory-gib" in str(*pool.decode(["eat"]))
