"""launch/supervise.py: what it makes of exit codes, and real commands that fail, stop and leave children behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_ranks import ROOT, python_environment

from megacog.runtime.outcome import Outcome
from megacog.runtime.supervise import fingerprint, judge


@pytest.mark.parametrize(
    ("code", "found", "kind"),
    [
        (0, [], "done"),
        (0, [Outcome("0", 0), Outcome("1", 0)], "done"),
        (0, [Outcome("0", None), Outcome("1", None)], "fault"),  # deepspeed whose launch.py was killed
        (85, [], "stopped"),
        (1, [Outcome("0", 85), Outcome("1", 85)], "stopped"),  # torchrun
        (1, [Outcome("0", 85), Outcome("1", None)], "fault"),
        (1, [Outcome("0", 75, "wrong key")], "refused"),  # torchrun
        (75, [], "refused"),
        (2, [], "refused"),
        (1, [], "fault"),
        (-9, [Outcome("0", 1, "rank 1 died"), Outcome("1", None)], "fault"),
    ],
)
def test_what_ranks_have_noted_counts_more_than_the_exit_code(code: int, found: list[Outcome], kind: str) -> None:
    assert judge(code, found).kind == kind


def test_the_same_fault_has_the_same_fingerprint_at_another_step() -> None:
    one, other = "rank 3 (pid 4711) died in save of step 8", "rank 12 (pid 99) died in save of step 1000"
    assert fingerprint(one) == fingerprint(other) != fingerprint(one.replace("save", "load"))


def test_other_exit_codes_are_other_faults() -> None:
    codes = ("exit code 1", "exit code 134", "exit code 139", "exit code -9", "exit code -11")
    assert len({fingerprint(f"1 of 2 processes here did not finish; {code}") for code in codes}) == len(codes)


def supervise(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch/supervise.py"), *arguments]
    return subprocess.Popen(
        command, env=python_environment() | (environment or {}), stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_a_command_that_fails_twice_is_started_three_times_with_growing_pauses(tmp_path: Path) -> None:
    script = f'echo x >>{tmp_path}/starts; [ "$(wc -l <{tmp_path}/starts)" = 3 ]'
    since = time.monotonic()
    code, said = end(supervise("--backoff", "0.4", "bash", "-c", script))
    assert code == 0 and said.count("start ") >= 3 and said.rstrip().endswith("done"), said
    assert "restart 1 in 0.4 s" in said and "restart 2 in 0.8 s" in said and time.monotonic() - since > 1.2


@pytest.mark.parametrize(
    ("script", "options", "code", "says", "starts"),
    [
        ("exit 3", [], 1, "given up: the same fault 3 times: exit code 3", 3),
        ("exit $((10 + $(wc -l <STARTS)))", ["--max-restarts", "1"], 1, "given up after 1 restarts", 2),
        ("exit 3", ["--min-uptime", "0", "--max-restarts", "0"], 1, "given up after 0 restarts", 1),
        ("sleep 0.4; exit 3", ["--min-uptime", "0.2"], 1, "given up: the same fault 3 times: exit code 3", 3),
        ("REACH same; exit 3", [], 1, "given up: the same fault 3 times: exit code 3", 3),
        ("n=$(wc -l <STARTS); REACH $n; [ $n = 4 ] || exit 3", [], 0, "done", 4),
        ("exit 75", [], 75, "not started again", 1),
        ('[ "$(wc -l <STARTS)" = 2 ] || exit 85', [], 0, "saved and stopped; restart 1 in 0 s", 2),
    ],
)
def test_it_stops_when_it_must(
    tmp_path: Path, script: str, options: list[str], code: int, says: str, starts: int
) -> None:
    reach = f"{sys.executable} -c 'import sys; from megacog.runtime.outcome import reach; reach(sys.argv[1])'"
    script = f"echo x >>STARTS; {script}".replace("STARTS", str(tmp_path / "starts")).replace("REACH", reach)
    found, said = end(supervise("--backoff", "0.1", *options, "bash", "-c", script))
    assert found == code and says in said, said
    assert len((tmp_path / "starts").read_text().split()) == starts


RANK = """
import os, signal, sys, time
from megacog.runtime import cli
from megacog.runtime.signals import StopFlag
def main():
    with StopFlag() as stop:
        open(sys.argv[1] + "/rank-" + os.environ["RANK"], "w").close()
        while not stop.requested:
            time.sleep(0.05)
        return 85
cli.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_goes_to_all_ranks_at_once_and_not_to_their_launcher(tmp_path: Path, number: signal.Signals) -> None:
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    # A launcher that would die of any of these signals, and whose exit code is 1 whatever its ranks do.
    launcher = f"for r in 0 1 2; do RANK=$r {sys.executable} {program} {tmp_path} & done; wait; exit 1"
    process = supervise("bash", "-c", launcher)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("rank-*"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    code, said = end(process)
    assert code == 85 and f"{number.name} to 3 ranks here" in said, said


EARLY = """
import os, signal, sys
from megacog.runtime import supervise
def claim_and_be_told(folder, claim=supervise.claim):
    claim(folder)
    os.kill(os.getpid(), signal.SIGTERM)
supervise.claim = claim_and_be_told
sys.exit(supervise.main(["sleep", "30"]))
"""


def test_a_signal_before_there_is_a_process_reaches_it_all_the_same() -> None:
    since = time.monotonic()
    command = [sys.executable, "-c", EARLY]
    done = subprocess.run(command, env=python_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "SIGTERM to the command" in done.stderr, done.stderr
    assert "not started again after SIGTERM" in done.stderr and time.monotonic() - since < 20


def test_a_folder_for_notes_that_cannot_be_made_is_a_fault_that_says_so(tmp_path: Path) -> None:
    program = "import sys, tempfile; from megacog.runtime import supervise; tempfile.tempdir = sys.argv[1] + '/gone'; "
    program += "sys.exit(supervise.main(['--backoff', '0.1', 'true']))"
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=python_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "given up: the same fault 3 times: no temporary folder for what the ranks note" in done.stderr
    assert "set TMPDIR" in done.stderr


def test_what_a_dead_launcher_leaves_behind_is_ended(tmp_path: Path) -> None:
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    launcher = f"RANK=0 {sys.executable} {program} {tmp_path} & echo $! >{tmp_path}/pid; sleep 60"
    process = supervise("--max-restarts", "0", "--leave-seconds", "20", "bash", "-c", f"({launcher}) & sleep 3; exit 7")
    code, said = end(process)
    assert code == 1 and "of its processes have not" in said, said
    # A process that has ended and waits for init has no command line any more.
    assert not any(str(tmp_path).encode() in _command(pid) for pid in os.listdir("/proc") if pid.isdigit())


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_command_that_is_not_there_is_refused() -> None:
    code, said = end(supervise("no-such-command-here"))
    assert code == 75 and "no-such-command-here" in said
