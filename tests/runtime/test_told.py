"""Who tells an error that every rank finds."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from megacog.errors import ConfigError, EnvError
from megacog.runtime.cli import explain
from megacog.runtime.ranks import Ranks
from megacog.runtime.signals import StopFlag
from megacog.runtime.told import told_by_rank_0


def left(rank: int, stop: StopFlag, patience: float) -> int | None:
    """Exit code of a rank whose configuration is wrong."""
    with pytest.raises(ConfigError) as found, told_by_rank_0(Ranks(rank, 2, rank, 2, "torchrun"), stop, patience):
        raise ConfigError("wrong")
    return explain(found.value)


def test_rank_0_tells_it_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert left(0, StopFlag(), patience=60) == 75
    assert capsys.readouterr().err == "error: wrong\n"


def test_the_others_say_nothing_and_leave_when_the_launcher_ends_them(capsys: pytest.CaptureFixture[str]) -> None:
    with StopFlag() as stop:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert left(1, stop, patience=60) == 75
    assert capsys.readouterr().err == ""


def test_a_rank_that_nobody_ends_has_an_error_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert left(1, StopFlag(), patience=0.1) == 75
    assert capsys.readouterr().err == "error: wrong\n"


def test_an_error_of_one_machine_is_told_by_its_ranks() -> None:
    with pytest.raises(EnvError) as found, told_by_rank_0(Ranks(1, 2, 1, 2, "torchrun"), StopFlag()):
        raise EnvError("no GPU")
    assert not found.value.told
