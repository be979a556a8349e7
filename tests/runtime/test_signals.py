from __future__ import annotations

import os
import signal

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
