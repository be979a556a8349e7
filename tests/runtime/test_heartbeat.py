"""Watched processes that die, hang and lose their watchers and launchers: small programs without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_ranks import python_environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watchers are for Linux")

PROGRAM = '''
import ctypes, os, sys, time
from pathlib import Path
from megacog.errors import MegacogError
from megacog.runtime.heartbeat import Limits, Watch, alive, beat
from megacog.runtime.ranks import Ranks

rank, world, folder, source = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
start = Limits(step=60.0, start=60.0, slow=60.0, lost=LOST)
with Watch(Ranks(rank, world, rank, world, source), start, folder) as watch:
    place = folder / "address"
    if rank == 0:
        temporary = folder / "address.tmp"
        temporary.write_text(repr(watch.open()))
        temporary.rename(place)
    while not place.exists():
        time.sleep(0.01)
    watch.join(eval(place.read_text()))
    (folder / f"met-{rank}").touch()
    while not all((folder / f"met-{other}").exists() for other in range(world)):
        time.sleep(0.01)
    watch.limits = Limits(step=LIMIT, start=LIMIT, slow=60.0, lost=LOST)
    beat("save", 7)
    (folder / f"begun-{rank}").touch()
BODY
'''
LOST = 5.0
"""Seconds of silence of a watcher that are too many."""
Processes = list[subprocess.Popen[str]]


@pytest.fixture
def started() -> Iterator[Processes]:
    processes: Processes = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def program_of(body: str, limit: float = 1.5) -> str:
    """A program that runs `body` under a limit in seconds, once all watchers have met."""
    text = PROGRAM.replace("BODY", textwrap.indent(textwrap.dedent(body), "    "))
    return text.replace("LIMIT", str(limit)).replace("LOST", str(LOST))


def start(started: Processes, folder: Path, body: str, world: int = 1, limit: float = 1.5) -> Processes:
    """Processes, each in a group of its own, that run `body` while they are watched, once their watchers have met."""
    for rank in range(world):
        command = [sys.executable, "-c", program_of(body, limit), str(rank), str(world), str(folder), "environment"]
        started.append(
            subprocess.Popen(
                command, env=python_environment(), stderr=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
            )
        )
    wait_for(lambda: len(list(folder.glob("begun-*"))) == world)
    return started


def wait_for(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what it has said."""
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def watcher_of(process: subprocess.Popen[str]) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"watcher" in Path(f"/proc/{pid}/cmdline").read_bytes())


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_process_that_makes_progress_is_left_alone_and_its_watcher_ends_with_it(
    started: Processes, tmp_path: Path
) -> None:
    body = "for _ in range(55):\n    beat('forward', 1); time.sleep(0.1)"
    (process,) = start(started, tmp_path, body, limit=4)
    watcher = watcher_of(process)
    assert end(process) == (0, "")
    wait_for(lambda: gone(watcher))


def test_progress_within_a_phase_counts(started: Processes, tmp_path: Path) -> None:
    body = "beat('evaluate', 1)\nfor _ in range(55):\n    alive(); time.sleep(0.1)"
    assert end(start(started, tmp_path, body, limit=4)[0]) == (0, "")


def test_a_run_that_is_suspended_for_longer_than_any_limit_goes_on(started: Processes, tmp_path: Path) -> None:
    body = """
        beat('forward', 7)
        (folder / f'ready-{rank}').touch()
        while not (folder / 'continued').exists():
            time.sleep(0.02)
        time.sleep(1.2)  # some looks of the watchers, without a beat
        beat('step', 7)
    """
    start(started, tmp_path, body, world=2, limit=6)
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    for number, seconds in ((signal.SIGSTOP, 8.0), (signal.SIGCONT, 0.0)):
        for process in started:
            os.killpg(process.pid, number)
        time.sleep(seconds)
    (tmp_path / "continued").touch()
    assert [end(process) for process in started] == [(0, ""), (0, "")]


def test_a_stuck_process_is_named_with_its_stack_and_ends_with_code_1(started: Processes, tmp_path: Path) -> None:
    body = "def sit_here():\n    time.sleep(60)\nbeat('forward', 7)\nsit_here()"
    code, said = end(start(started, tmp_path, body)[0])
    assert code == 1
    assert f"rank 0 on {os.uname().nodename} (pid {started[0].pid}) is stuck in forward of step 7" in said
    assert "in sit_here" in said and "_listen" not in said
    assert "sit_here" in (tmp_path / "heartbeat.log").read_text()
    assert json.loads((tmp_path / "heartbeat.json").read_text())["ranks"][0]["rank"] == 0


def test_the_stacks_of_threads_that_run_are_read_without_harm(started: Processes, tmp_path: Path) -> None:
    body = """
        import faulthandler, threading
        faulthandler.enable()  # a SIGSEGV then tells of itself

        def go_deep(depth):
            return [value + 1 for value in range(3)] if depth == 0 else go_deep(depth - 1)

        def compute_on_and_on():
            while True:
                go_deep(200)  # python gives memory of stacks this deep back again and again

        for _ in range(3):
            threading.Thread(target=compute_on_and_on, daemon=True).start()
        beat('forward', 7)
        time.sleep(60)
    """
    (process,) = start(started, tmp_path, body, limit=4)
    asked = time.monotonic()
    while time.monotonic() < asked + 1:
        process.send_signal(signal.SIGUSR2)
        time.sleep(0.0002)
    code, said = end(process)
    assert code == 1 and "Fatal" not in said
    assert sum("in go_deep" in thread or "in compute_on" in thread for thread in said.split("\n\n")) == 3, said


def test_a_process_that_never_lets_go_of_python_is_killed_and_its_stack_told(
    started: Processes, tmp_path: Path
) -> None:
    body = """
        beat('forward', 7)
        library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)  # PyDLL keeps the lock that threads need
        for _ in range(2):
            library.pthread_mutex_lock(mutex)
    """
    code, said = end(start(started, tmp_path, body)[0])
    assert code == -signal.SIGKILL
    assert "is stuck in forward of step 7" in said and "most recent call first" in said


def test_the_rank_that_the_other_waits_for_is_named_by_both(started: Processes, tmp_path: Path) -> None:
    body = "beat('forward', 7)\nif rank == 0:\n    beat('step', 7)\ntime.sleep(60)"
    for code, said in map(end, start(started, tmp_path, body, world=2, limit=3)):
        assert code == 1 and "(pid " in said
        assert f"rank 1 on {os.uname().nodename}" in said and "is stuck in forward of step 7" in said


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_ends_with_code_1_and_says_who(
    started: Processes, tmp_path: Path, victim: int
) -> None:
    start(started, tmp_path, "time.sleep(60)", world=2)
    since = time.monotonic()
    started[victim].kill()
    code, said = end(started[1 - victim])
    assert code == 1 and f"rank {victim} on" in said and "died in save of step 7" in said
    assert time.monotonic() - since < 10


def test_an_error_of_one_ends_the_other_with_its_text(started: Processes, tmp_path: Path) -> None:
    body = "if rank == 1:\n    raise MegacogError('shard 3 is damaged')\ntime.sleep(60)"
    start(started, tmp_path, body, world=2)
    assert end(started[0])[0] == 1
    code, said = end(started[1])
    assert code == 1 and said.rstrip().endswith("MegacogError: shard 3 is damaged")


def test_an_error_of_all_is_left_to_each(started: Processes, tmp_path: Path) -> None:
    start(started, tmp_path, "try:\n    raise MegacogError('the same')\nfinally:\n    sys.stderr.flush()", world=2)
    for code, said in map(end, started):
        assert code == 1 and "WATCH" not in said and said.rstrip().endswith("MegacogError: the same")


@pytest.mark.parametrize(("number", "says"), [(signal.SIGKILL, "has died"), (signal.SIGSTOP, "has not answered")])
def test_a_process_does_not_outlive_its_watcher(
    started: Processes, tmp_path: Path, number: signal.Signals, says: str
) -> None:
    (process,) = start(started, tmp_path, "time.sleep(60)")
    watcher = watcher_of(process)
    os.kill(watcher, number)
    code, said = end(process)
    assert code == 1 and f"its watcher {says}" in said
    wait_for(lambda: gone(watcher))


def test_a_watcher_leaves_signals_to_its_rank(started: Processes, tmp_path: Path) -> None:
    body = "while not (folder / 'signaled').exists():\n    time.sleep(0.02)\ntime.sleep(1)"
    (process,) = start(started, tmp_path, body)
    watcher = watcher_of(process)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(watcher, number)
    (tmp_path / "signaled").touch()
    assert end(process) == (0, "")


def test_a_rank_without_its_launcher_is_told_to_stop(tmp_path: Path) -> None:
    body = """
        import signal
        signal.signal(signal.SIGTERM, lambda *_: (folder / 'told').touch() or os._exit(85))
        (folder / 'ready').touch()
        time.sleep(60)
    """
    program = tmp_path / "program.py"
    program.write_text(program_of(body))
    # The shell is the launcher: it does not pass signals on.
    command = f"{sys.executable} {program} 0 1 {tmp_path} torchrun & wait"
    launcher = subprocess.Popen(["bash", "-c", command], env=python_environment(), stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "ready").exists())
    launcher.send_signal(signal.SIGUSR1)
    launcher.wait()
    wait_for(lambda: (tmp_path / "told").exists())
