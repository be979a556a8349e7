"""Faults on purpose: what is asked for comes, where it is asked for, and nowhere else."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megacog.errors import ConfigError
from megacog.runtime import faults
from megacog.runtime.faults import PHASES, VARIABLE, Fault, arm, fault_point, parse


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm(0, {})


def test_nothing_happens_without_the_variable() -> None:
    arm(0, {})
    assert faults._plan is None
    assert all(fault_point(phase, 7) is None for phase in PHASES)


def test_every_key_is_read() -> None:
    text = "rank:1, step:7, phase:save, kind:sleep, seconds:0.5, once:/tmp/a b ; phase:load,kind:kill"
    expected = [Fault("save", "sleep", 1, 7, 0.5, Path("/tmp/a b")), Fault("load", "kill")]
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank:1", "phase must be one of data, forward"),
        ("phase:lunch,kind:kill", "phase must be one of"),
        ("phase:save,kind:explode", "kind must be one of kill, stop, sleep, enospc"),
        ("phase:save,kind:flip", "kind must be one of kill, stop, sleep, enospc"),
        ("phase:data,kind:kill,color:red", "'color:red'"),
        ("phase:data,kind:kill,phase:save", "'phase:save'"),
        ("phase:data,kind:kill,step", "'step'"),
        ("phase:data,kind:kill,step:two", "whole numbers"),
        ("phase:data,kind:sleep", "needs seconds"),
        ("phase:data,kind:kill,seconds:1", "needs seconds"),
    ],
)
def test_a_value_that_cannot_be_understood_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        arm(0, {VARIABLE: text})
    assert VARIABLE in str(error.value)


def test_a_fault_comes_on_its_rank_in_its_step_and_phase_once(caplog: pytest.LogCaptureFixture) -> None:
    arm(0, {VARIABLE: "rank:1,step:7,phase:forward,kind:nan"})
    assert fault_point("forward", 7) is None
    with caplog.at_level(logging.WARNING):
        arm(1, {VARIABLE: "rank:1,step:7,phase:forward,kind:nan"})
    assert "a fault will be injected on rank 1" in caplog.text
    assert fault_point("forward", 6) is None and fault_point("backward", 7) is None
    assert [fault_point("forward", 7) for _ in range(2)] == ["nan", None]


def test_a_fault_without_a_step_comes_in_every_step() -> None:
    arm(3, {VARIABLE: "phase:step,kind:flip"})
    assert [fault_point("step", step) for step in (1, 1, 2)] == ["flip", None, "flip"]


def test_a_fault_that_left_its_file_does_not_come_again(tmp_path: Path) -> None:
    text = {VARIABLE: f"phase:forward,kind:nan,once:{tmp_path / 'came'}"}
    arm(0, text)
    assert fault_point("forward", 1) == "nan" and (tmp_path / "came").exists()
    arm(0, text)
    assert fault_point("forward", 1) is None


def test_a_full_disk_is_an_error_of_the_write() -> None:
    arm(0, {VARIABLE: "phase:save,kind:enospc"})
    with pytest.raises(OSError) as error:
        fault_point("save", 4)
    assert error.value.errno == errno.ENOSPC


def test_sleep_kill_and_stop_are_real() -> None:
    arm(0, {VARIABLE: "phase:data,kind:sleep,seconds:0.2"})
    start = time.monotonic()
    fault_point("data", 1)
    assert time.monotonic() - start >= 0.2
    program = "from megacog.runtime.faults import arm, fault_point\narm(0)\nfault_point('save', 1)"
    for kind, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
        environment = os.environ | {VARIABLE: f"phase:save,kind:{kind}"}
        process = subprocess.Popen([sys.executable, "-c", program], env=environment)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        if kind == "stop":
            assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == number
            process.kill()
            os.waitpid(process.pid, 0)
        else:
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number
        process.returncode = 0  # it was waited for here
