from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from megacog.errors import ConfigError, DataError
from megacog.runtime import log
from megacog.runtime.cli import run
from megacog.runtime.hardware import describe_device, memory_gib, peak_tflops
from megacog.runtime.progress import progress


def exit_code(main: object) -> object:
    with pytest.raises(SystemExit) as info:
        run(main)  # type: ignore[arg-type]
    return info.value.code


def test_a_command_leaves_with_the_code_it_returns() -> None:
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 85) == 85


def test_a_command_can_leave_at_once_with_all_that_it_said() -> None:
    code = (
        "import atexit, os, sys\n"
        "from megacog.runtime.cli import run\n"
        "atexit.register(os.abort)\n"
        "run(lambda: print('said') or print('told', file=sys.stderr) or 85, leave=os._exit)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (85, "said\n", "told\n")


@pytest.mark.parametrize(("error", "code"), [(ConfigError("bad key"), 75), (DataError("bad shard"), 1)])
def test_a_user_error_is_one_message_without_a_traceback(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def main() -> None:
        raise error

    assert exit_code(main) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupt_is_one_line_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    assert exit_code(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("bug", [ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "no such file", "x")])
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    def main() -> None:
        raise bug

    with pytest.raises(type(bug)):
        run(main)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.ENOTDIR, errno.EROFS])
def test_what_the_machine_refuses_is_one_message_with_path_and_advice(
    capsys: pytest.CaptureFixture[str], code: int
) -> None:
    def main() -> None:
        raise OSError(code, os.strerror(code), "/a/b")

    assert exit_code(main) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: /a/b: {os.strerror(code)}. ") and "another place" in message


def test_a_reader_that_goes_away_gives_no_traceback() -> None:
    code = "from megacog.runtime.cli import run\nrun(lambda: print('x\\n' * 10**6))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_rank_0_logs_everything_and_other_ranks_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    logger = log.get_logger("megacog.test")
    log.setup(0)
    logger.info("hello")
    log.setup(3)
    logger.info("silent")
    logger.warning("careful")
    err = capsys.readouterr().err
    assert "I hello" in err and "silent" not in err and "rank 3 W careful" in err
    log.setup(0)


def test_progress_passes_the_items_and_writes_lines_when_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megacog.runtime.progress._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setenv("RANK", "0")
    assert list(progress([1, 2], desc="encoding")) == [1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("encoding: 1/2 (50%")
    assert lines[-1].startswith("encoding: 2 in ")


def test_progress_says_nothing_on_other_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert list(progress(iter("ab"), total=2, desc="encoding")) == ["a", "b"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA B9000", None),
        ("AMD EPYC 7763", None),
    ],
)
def test_peaks_are_known_by_exact_name_and_unknown_devices_have_none(name: str, bf16: float | None) -> None:
    assert peak_tflops(name, "bf16") == bf16


def test_fp32_has_its_own_peak_and_other_precisions_are_refused() -> None:
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5
    with pytest.raises(ValueError, match="fp8"):
        peak_tflops("NVIDIA H200", "fp8")


def test_the_device_is_described_and_memory_measured() -> None:
    assert "torch" in describe_device()
    assert 0.01 < memory_gib() < 1000
