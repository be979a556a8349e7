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
    program = (
        "import os, signal, time\n"
        "from megacog.runtime import signals\n"
        "signals._SAME_INTERRUPT = 3.0\n"  # a busy machine may need a moment between the first two
        "with signals.StopFlag() as flag:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"  # of the terminal and of the launcher: one
        "    time.sleep(3.2)\n"
        "    assert flag.requested\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n        print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_a_second_interrupt_ends_a_process_that_sits_in_native_code() -> None:
    program = (
        "import ctypes, os, signal, threading, time\n"
        "from megacog.runtime.signals import StopFlag\n"
        "def interrupt():\n"
        "    while True:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(0.7)\n"
        "with StopFlag():\n"
        "    threading.Timer(0.2, interrupt).start()\n"
        "    libc = ctypes.CDLL(None)\n"
        "    pause = lambda: libc.pthread_mutex_lock(mutex)\n"
        "    mutex = ctypes.create_string_buffer(64)\n"
        "    pause()\n    pause()\n"  # the second one never returns, whatever signals come
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_reason_other_than_a_signal_is_kept_when_a_signal_follows() -> None:
    with StopFlag() as flag:
        flag.request("train.max_minutes")
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.requested and flag.signal_name == "train.max_minutes"


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
