"""Loader processes change neither the order nor the errors."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_faults import children, hang, kill, misbehave

from megacog.config.schema import Config
from megacog.data.batch import Batch
from megacog.data.loader import training_batches
from megacog.errors import ConfigError, DataError, EnvError
from megacog.tokenizers.text import TextTokenizer

Write = Callable[..., Path]
Make = Callable[..., Config]
CLIPS = [(f"clip-{index}", 9 + 8 * index, 8.0) for index in range(5)]


def take(config: Config, text: TextTokenizer, count: int, rank: int = 0, size: int = 1, start: int = 0) -> list[Batch]:
    with training_batches(config, text, data_rank=rank, data_size=size, start_step=start) as batches:
        return [next(batches) for _ in range(count)]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.sample_ids == b.sample_ids
        for name in ("text_BL", "text_valid_BL", "frames_BTP", "fps_B"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert (a.context_BTP is None) == (b.context_BTP is None)
        assert a.context_BTP is None or torch.equal(a.context_BTP, b.context_BTP)


def test_a_batch_has_the_model_s_shapes_and_types(write_clips: Write, make_config: Make, text: TextTokenizer) -> None:
    config = make_config([write_clips("a.h5", CLIPS)], train={"context_corruption": 0.1})
    batch = take(config, text, 1)[0]
    assert len(batch) == 2
    assert batch.text_BL.shape == batch.text_valid_BL.shape == (2, 24)
    assert batch.text_valid_BL.dtype == torch.bool and batch.text_valid_BL[:, -1].all()
    assert batch.frames_BTP.shape == (2, 5, 4) and batch.frames_BTP.dtype == torch.int64
    assert batch.context_BTP is not None and batch.context_BTP.dtype == torch.int64
    assert batch.fps_B.dtype == torch.float32
    moved = batch.to("meta")
    assert moved.frames_BTP.device.type == "meta" and moved.sample_ids == batch.sample_ids


@pytest.mark.parametrize("workers", [1, 3])
def test_the_order_does_not_depend_on_the_number_of_workers(
    write_clips: Write, make_config: Make, text: TextTokenizer, workers: int
) -> None:
    path = write_clips("a.h5", CLIPS)
    alone = make_config([path], train={"context_corruption": 0.2})
    helped = make_config([path], train={"context_corruption": 0.2}, data={"workers": workers})
    before = children()
    assert_same(take(alone, text, 9, start=3), take(helped, text, 9, start=3))
    assert children() == before, "loader processes remain after close()"


def test_a_run_resumed_on_two_ranks_goes_on_where_one_rank_stopped(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    config = make_config([write_clips("a.h5", CLIPS)])
    straight = [sample for batch in take(config, text, 24) for sample in batch.sample_ids]
    resumed = [sample for batch in take(config, text, 8) for sample in batch.sample_ids]
    ranks = [take(config, text, 8, rank, 2, start=2) for rank in range(2)]
    for step in range(0, 8, 2):
        for micro in range(2):
            resumed += ranks[0][step + micro].sample_ids + ranks[1][step + micro].sample_ids
    assert resumed == straight


def test_another_seed_gives_other_samples(write_clips: Write, make_config: Make, text: TextTokenizer) -> None:
    path = write_clips("a.h5", CLIPS)
    first, second = (take(make_config([path], train={"seed": seed}), text, 4) for seed in (1, 2))
    assert [batch.sample_ids for batch in first] != [batch.sample_ids for batch in second]


def test_a_global_batch_that_does_not_fit_the_ranks_is_a_configuration_error(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    config = make_config([write_clips("a.h5", CLIPS)])
    with pytest.raises(ConfigError, match="global_batch_size 8.*3 data-parallel ranks"):
        training_batches(config, text, data_rank=0, data_size=3, start_step=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_frame_is_reported_as_it_is_from_any_process(
    write_clips: Write, make_config: Make, text: TextTokenizer, workers: int
) -> None:
    path = write_clips("a.h5", [("good", 9, 8.0), ("bad", 9, 8.0)])
    data = bytearray(path.read_bytes())
    # codes of the last frame of "bad": (1 + 8 + p) % 16
    start = data.index(b"\x09\x00\x0a\x00\x0b\x00\x0c\x00", data.index(b"\x08\x00\x09\x00\x0a\x00\x0b\x00") + 9)
    data[start] ^= 1
    path.write_bytes(data)
    config = make_config([path], data={"workers": workers})
    with (
        pytest.raises(DataError, match=r"a.h5: frame 8 of clip 'bad' is damaged") as caught,
        training_batches(config, text, data_rank=0, data_size=1, start_step=0) as batches,
    ):
        for _ in range(20):
            next(batches)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", [kill, hang])
def test_a_loader_process_that_dies_or_hangs_is_replaced_and_nobody_can_tell(
    write_clips: Write,
    make_config: Make,
    text: TextTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[], None],
) -> None:
    path = write_clips("a.h5", CLIPS)
    expected = take(make_config([path]), text, 40)
    misbehave(monkeypatch, tmp_path, fault, [21])
    before = children()
    # One that hangs is waited for; the healthy ones need all the time that a busy machine takes.
    config = make_config([path], data={"workers": 2, "worker_timeout": 5 if fault is hang else 60})
    assert_same(take(config, text, 40), expected)
    assert children() == before
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(rf"loader process .* while reading clip 'clip-\d' of {path}; it is repl", told)


@pytest.mark.parametrize(("fault", "message"), [(kill, r"died \(signal SIGKILL\)"), (hang, "gave nothing for 3 s.*")])
def test_a_loader_process_whose_replacement_fails_too_ends_the_run_and_names_the_clip(
    write_clips: Write,
    make_config: Make,
    text: TextTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[], None],
    message: str,
) -> None:
    path = write_clips("a.h5", CLIPS)
    misbehave(monkeypatch, tmp_path, fault, range(5, 100))
    before = children()
    with (
        pytest.raises(EnvError, match=rf"a loader process {message} while reading clip 'clip-\d' of {path}.*so did"),
        training_batches(
            make_config([path], data={"workers": 1, "worker_timeout": 3}), text, data_rank=0, data_size=1, start_step=0
        ) as batches,
    ):
        assert [next(batches) for _ in range(2)]
        next(batches)
    assert children() == before


def test_a_loader_process_that_stops_in_the_middle_of_a_batch_is_replaced(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    path = write_clips("a.h5", [("wide", 9, 8.0)], grid=(200, 200))  # batches larger than the socket's buffer
    sections = {"model": {"grid": (200, 200)}, "data": {"workers": 1, "worker_timeout": 5}}
    config = make_config([path], **sections)
    before = children()
    with training_batches(config, text, data_rank=0, data_size=1, start_step=0) as batches:
        found = [next(batches)]
        time.sleep(0.2)
        (worker,) = children() - before
        os.kill(worker, signal.SIGSTOP)
        found += [next(batches) for _ in range(3)]
        assert children() - before != {worker}
    assert_same(found, take(make_config([path], model={"grid": (200, 200)}), text, 4))


def test_a_bug_in_a_loader_process_keeps_its_traceback(
    write_clips: Write, make_config: Make, text: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KeyError("a bug")

    misbehave(monkeypatch, tmp_path, fail, [3])
    config = make_config([write_clips("a.h5", CLIPS)], data={"workers": 2})
    before = children()
    with (
        pytest.raises(RuntimeError, match=r"(?s)while reading clip 'clip-\d' of .*Traceback.*KeyError: 'a bug'"),
        training_batches(config, text, data_rank=0, data_size=1, start_step=0) as batches,
    ):
        for _ in range(9):
            next(batches)
    assert children() == before


def test_loader_processes_leave_signals_to_the_training_process(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    config = make_config([write_clips("a.h5", CLIPS)], data={"workers": 2})
    before = children()
    with training_batches(config, text, data_rank=0, data_size=1, start_step=0) as batches:
        next(batches)
        next(batches)
        for worker in children() - before:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
        time.sleep(0.1)
        assert_same([next(batches) for _ in range(10)], take(config, text, 12)[2:])


def test_closed_batches_say_so(write_clips: Write, make_config: Make, text: TextTokenizer) -> None:
    batches = training_batches(make_config([write_clips("a.h5", CLIPS)]), text, data_rank=0, data_size=1, start_step=0)
    batches.close()
    batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_never_touches_the_random_numbers_of_the_model(
    write_clips: Write, make_config: Make, text: TextTokenizer, workers: int
) -> None:
    config = make_config([write_clips("a.h5", CLIPS)], train={"context_corruption": 0.5}, data={"workers": workers})
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    take(config, text, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_the_random_numbers_of_the_model_never_touch_loading(
    write_clips: Write, make_config: Make, text: TextTokenizer
) -> None:
    config = make_config([write_clips("a.h5", CLIPS)], train={"context_corruption": 0.5})
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    first = take(config, text, 4)
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    assert_same(first, take(config, text, 4))


@pytest.mark.parametrize(
    "ending",
    ["raise ValueError('a bug')", pytest.param("pass", marks=pytest.mark.slow)],
    ids=["error", "end"],
)
def test_a_program_that_never_closes_its_batches_ends_all_the_same(
    write_clips: Write, make_config: Make, text_folder: Path, tmp_path: Path, ending: str
) -> None:
    config = make_config([write_clips("a.h5", CLIPS)], data={"workers": 2})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = (
        "from pathlib import Path\n"
        "from megacog.config.schema import Config\n"
        "from megacog.data.loader import training_batches\n"
        "from megacog.tokenizers.text import TextTokenizer\n"
        f"config = Config.model_validate_json(Path({str(tmp_path / 'config.json')!r}).read_text())\n"
        f"text = TextTokenizer.load(Path({str(text_folder)!r}))\n"
        "batches = training_batches(config, text, data_rank=0, data_size=1, start_step=0)\n"
        "next(batches)\n"
        f"{ending}\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == (0 if ending == "pass" else 1), result.stderr
    assert result.stderr.strip().endswith("" if ending == "pass" else "ValueError: a bug")
