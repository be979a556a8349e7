from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from megacog.runtime.signals import StopFlag


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_signal_sets_the_flag_and_the_process_goes_on(number: signal.Signals) -> None:
    with StopFlag() as flag:
        assert not flag.requested
        os.kill(os.getpid(), number)
        assert flag.requested
        assert flag.signal_name == number.name


def test_a_second_interrupt_is_a_keyboard_interrupt() -> None:
    with StopFlag() as flag:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert flag.requested


def test_a_repeated_sigterm_changes_nothing() -> None:
    with StopFlag() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.signal_name == "SIGTERM"


def test_the_former_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopFlag():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_process_on_its_way_out_keeps_its_exit_code() -> None:
    program = (
        "import os, signal\n"
        "from megacog.runtime.signals import StopFlag\n"
        "with StopFlag() as flag:\n    flag.leaving = {leaving}\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "raise SystemExit(85)"
    )
    codes = [
        subprocess.run([sys.executable, "-c", program.format(leaving=leaving)]).returncode for leaving in (True, False)
    ]
    assert codes == [85, -signal.SIGTERM]
